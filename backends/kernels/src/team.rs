//! Short parallel loops, one after the other, on threads that stay awake between them.
//!
//! Decoding a token is some hundred loops of a few microseconds each. A thread of rayon's that has found nothing to do
//! for that long goes to sleep, and to wake it takes as long as the loop. Within [`awake`] the other threads wait for
//! the next loop without sleeping.

use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Looks for work before a thread lets others have its core.
const PATIENCE: u32 = 10_000;
/// A thread without work for this long leaves: it may have come while it waited for a part of a piece, which rayon lets
/// others take, and the piece waits for it then.
const IDLE: Duration = Duration::from_millis(100);

thread_local! {
    /// The team whose loops this thread begins; null on all others, and within a loop.
    static LEADS: Cell<*const Team> = const { Cell::new(ptr::null()) };
}

/// One place for each thread, the first for the one that leads. There is at most one loop at a time.
struct Team {
    places: Vec<Place>,
    /// Threads that have come.
    members: AtomicUsize,
    /// Pieces of all loops.
    begun: AtomicUsize,
    panicked: AtomicBool,
}

/// What a thread has to do. It has its own lines of memory, as between cores far apart each line that changes hands
/// costs as much as some rows of a product; who has nothing to do looks at no other place than its own.
#[derive(Default)]
#[repr(align(128))]
struct Place {
    job: AtomicPtr<Job>,
    /// The first piece that nobody has taken yet, and the one after the last. Neighbours lie next to each other in
    /// memory, so that a thread reads on where it is as long as it can; others take from the end.
    left: AtomicU64,
    /// Pieces that the thread has done, here and elsewhere, in all loops.
    done: AtomicUsize,
    closed: AtomicBool,
}

struct Job {
    /// Outlives the loop, which ends when all pieces are done.
    work: *const (dyn Fn(usize) + Sync),
}

/// Runs what consists of many short loops. The threads of the current pool share the work of those that are begun with
/// [`for_each`]; they keep their cores busy until the end.
pub fn awake<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    /// Also where `run` panics.
    struct End<'a> {
        team: &'a Team,
        led_before: *const Team,
    }
    impl Drop for End<'_> {
        fn drop(&mut self) {
            LEADS.set(self.led_before);
            self.team.places.iter().for_each(|place| place.closed.store(true, Ordering::Release));
        }
    }

    let threads = rayon::current_num_threads();
    let team = Team::new(threads);
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| team.help());
        }
        let _end = End { team: &team, led_before: LEADS.replace(&team) };
        run()
    })
}

/// Calls `work` for each number below `pieces`, on all threads.
pub fn for_each(pieces: usize, work: impl Fn(usize) + Sync) {
    let team = LEADS.get();
    // More than fit into a place are no short loop.
    if team.is_null() || u32::try_from(pieces).is_err() {
        return (0..pieces).into_par_iter().for_each(&work);
    }
    if pieces < 2 {
        return (0..pieces).for_each(work);
    }
    // SAFETY: `awake` resets the pointer before the team ends.
    unsafe { &*team }.lead(pieces, &work);
}

/// Calls `work` for each piece of `size` elements, the last one perhaps shorter, with its number.
pub fn for_each_piece<T: Send>(values: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    struct Start<T>(*mut T);
    // SAFETY: the threads use disjoint parts of what it points to.
    unsafe impl<T: Send> Sync for Start<T> {}
    impl<T> Start<T> {
        fn get(&self) -> *mut T {
            self.0
        }
    }

    let (len, start) = (values.len(), Start(values.as_mut_ptr()));
    for_each(len.div_ceil(size), |piece| {
        let first = piece * size;
        // SAFETY: within the values, and no two pieces overlap.
        let part = unsafe { std::slice::from_raw_parts_mut(start.get().add(first), size.min(len - first)) };
        work(piece, part);
    });
}

impl Place {
    const HALF: u32 = u64::BITS / 2;

    fn begin(&self, job: *mut Job, pieces: Range<usize>) {
        self.job.store(job, Ordering::Relaxed);
        self.left.store((pieces.start as u64) << Self::HALF | pieces.end as u64, Ordering::Release);
    }

    fn left(&self) -> Range<u64> {
        Self::unpack(self.left.load(Ordering::Acquire))
    }

    fn unpack(left: u64) -> Range<u64> {
        left >> Self::HALF..left & u64::from(u32::MAX)
    }

    /// Works on pieces from here until there are none. `which` names one of them, and leaves the rest.
    fn work(&self, team: &Team, which: impl Fn(Range<u64>) -> (u64, Range<u64>)) -> usize {
        let mut done = 0;
        loop {
            let take = |left| {
                let left = Self::unpack(left);
                (!left.is_empty()).then(|| which(left).1).map(|rest| rest.start << Self::HALF | rest.end)
            };
            let Ok(left) = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) else {
                return done;
            };
            let (piece, _) = which(Self::unpack(left));
            // SAFETY: the loop goes on until this piece is done, so that it is the one that the piece was taken from.
            let run = || unsafe { (*(*self.job.load(Ordering::Relaxed)).work)(piece as usize) };
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                team.panicked.store(true, Ordering::Relaxed);
            }
            done += 1;
        }
    }
}

impl Team {
    fn new(threads: usize) -> Self {
        Self {
            places: (0..threads).map(|_| Place::default()).collect(),
            members: AtomicUsize::new(1),
            begun: AtomicUsize::default(),
            panicked: AtomicBool::default(),
        }
    }

    fn lead(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; the job is over before this returns.
        let work = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                work,
            )
        };
        let mut job = Job { work };
        // Taken once: to take it again would end the use of the first.
        let job = &raw mut job;
        // A loop within this one is for others.
        let team = LEADS.replace(ptr::null());
        let begun = self.begun.fetch_add(pieces, Ordering::Relaxed) + pieces;
        let threads = self.places.len();
        for (i, place) in self.places.iter().enumerate() {
            place.begin(job, i * pieces / threads..(i + 1) * pieces / threads);
        }
        self.work(0);
        let done = || self.places.iter().map(|place| place.done.load(Ordering::Acquire)).sum::<usize>();
        let mut looks = 0;
        while done() < begun {
            pause(&mut looks);
        }
        LEADS.set(team);
        if self.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a loop on several threads panicked"));
        }
    }

    fn help(&self) {
        // Whoever waits for other loops meanwhile takes up what it finds.
        if !LEADS.get().is_null() {
            return;
        }
        let member = self.members.fetch_add(1, Ordering::Relaxed);
        let place = &self.places[member];
        let (mut looks, mut idle_since) = (0, None);
        while !place.closed.load(Ordering::Acquire) {
            if !place.left().is_empty() {
                (looks, idle_since) = (0, None);
                self.work(member);
            } else if pause(&mut looks) && idle_since.get_or_insert_with(Instant::now).elapsed() > IDLE {
                return;
            }
        }
    }

    /// Works on the pieces of a thread's own place, and then on those of others.
    fn work(&self, member: usize) {
        let (before, from) = self.places.split_at(member);
        let Some((own, after)) = from.split_first() else { return };
        let mut done = own.work(self, |left| (left.start, left.start + 1..left.end));
        for other in after.iter().chain(before) {
            done += other.work(self, |left| (left.end - 1, left.start..left.end - 1));
        }
        own.done.fetch_add(done, Ordering::Release);
    }
}

/// Whether others had the core meanwhile.
fn pause(looks: &mut u32) -> bool {
    *looks += 1;
    let patient = *looks < PATIENCE;
    if patient {
        std::hint::spin_loop();
    } else {
        *looks = 0;
        std::thread::yield_now();
    }
    !patient
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squares(len: usize) -> Vec<usize> {
        let mut values: Vec<usize> = (0..len).collect();
        for_each_piece(&mut values, 3, |piece, part| {
            for (i, value) in part.iter_mut().enumerate() {
                assert_eq!(*value, 3 * piece + i);
                *value *= *value;
            }
        });
        values
    }

    #[test]
    fn every_piece_is_worked_on_once() {
        let expected = |len| (0..len).map(|i| i * i).collect::<Vec<_>>();
        for len in [0, 1, 3, 4, 100] {
            assert_eq!(squares(len), expected(len));
        }
        awake(|| {
            for len in (0..2000).map(|i| i % 40) {
                assert_eq!(squares(len), expected(len));
            }
        });
    }

    #[test]
    fn other_loops_may_run_within() {
        let sum = awake(|| {
            let sum = AtomicUsize::new(0);
            for_each(20, |i| {
                for_each(20, |j| {
                    sum.fetch_add(i * j, Ordering::Relaxed);
                });
            });
            let inner = awake(|| squares(10).into_iter().sum::<usize>());
            let more: usize = (0..10_000usize).into_par_iter().sum();
            sum.into_inner() + inner + more
        });
        assert_eq!(sum, 190 * 190 + 285 + 49_995_000);
    }

    #[test]
    fn a_thread_without_work_leaves() {
        let team = Team::new(2);
        team.help();
        let sum = AtomicUsize::new(0);
        team.lead(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    /// Inner loops are cut up, and threads that wait for parts of them find that they are wanted in the team.
    #[test]
    fn more_threads_than_come_at_once_do_not_wait_for_each_other() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        for round in 0..1000 {
            let count = AtomicUsize::new(0);
            let inner = |i| {
                for_each(20, |j| {
                    (0..i * j * round % 40).for_each(|_| std::hint::spin_loop());
                    count.fetch_add(1, Ordering::Relaxed);
                });
            };
            pool.install(|| awake(|| for_each(20, inner)));
            assert_eq!(count.into_inner(), 400);
        }
    }

    #[test]
    fn a_panic_comes_out_and_leaves_the_threads_usable() {
        for _ in 0..50 {
            let outcome = catch_unwind(|| awake(|| for_each(8, |i| assert_ne!(i, 5))));
            assert!(outcome.is_err());
        }
        assert_eq!(awake(|| squares(4)), [0, 1, 4, 9]);
    }
}
