//! A process tree under Linux, from `/proc`.

use super::{COST_DIVISOR, CgroupPeak, PhaseFigures};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const MEASURE: &str = "tree";

/// Reading proportional sizes walks the page tables: it is done where phases end, where a process came or went, and,
/// in a tree of several, where the resident sizes have changed by more than this.
const CHANGE: f64 = 0.005;
const SMALLEST_CHANGE: u64 = 1 << 20;

pub struct Watcher {
    root: u32,
    /// By process, the part of its resident size that is counted elsewhere, when the proportional sizes were last read.
    shared: BTreeMap<u32, u64>,
    resident_when_read: u64,
    /// What proportional sizes leave to processes outside of the tree: the code of a program that runs elsewhere as well.
    /// Known from when the root was alone.
    outside: u64,
    next_reading: Instant,
    /// Largest of the looks in this phase.
    peak: u64,
    /// Whether the kernel's high-water marks are those of the phase.
    marks_hold: bool,
    cgroup: Option<Cgroup>,
}

/// Sizes of a tree in which each page counts once.
#[derive(Default)]
struct Reading {
    total: u64,
    anonymous: u64,
    file: u64,
}

impl Watcher {
    pub fn new(root: u32) -> Self {
        Self {
            root,
            shared: BTreeMap::new(),
            resident_when_read: 0,
            outside: 0,
            next_reading: Instant::now(),
            peak: 0,
            marks_hold: true,
            cgroup: Cgroup::of(root, Path::new("/proc"), Path::new("/sys/fs/cgroup")),
        }
    }

    /// Bytes now, shared pages counted once; `None` if no process is there.
    pub fn look(&mut self) -> Option<u64> {
        let resident: BTreeMap<u32, u64> =
            tree(self.root).into_iter().filter_map(|pid| Some((pid, resident(pid)?))).collect();
        let sum: u64 = resident.values().sum();
        if sum == 0 {
            return None;
        }
        let same_processes = resident.keys().eq(self.shared.keys());
        let tolerance = SMALLEST_CHANGE.max((self.resident_when_read as f64 * CHANGE) as u64);
        let has_changed = resident.len() > 1 && sum.abs_diff(self.resident_when_read) > tolerance;
        let reading = (!same_processes || has_changed) && Instant::now() >= self.next_reading;
        let bytes = match reading.then(|| self.read()).flatten() {
            Some(reading) => reading.total,
            // Pages of a process that is not known yet may be its parent's: it counts from the next reading on.
            None => {
                let own = |(pid, bytes): (&u32, &u64)| Some(bytes.saturating_sub(*self.shared.get(pid)?));
                resident.iter().filter_map(own).sum()
            }
        };
        self.peak = self.peak.max(bytes);
        Some(bytes)
    }

    /// The processes of the last look.
    pub fn pids(&self) -> Vec<u32> {
        self.shared.keys().copied().collect()
    }

    pub fn begin_phase(&mut self) {
        // proc(5): 5 resets the peak resident set size. Refused only for a process of another user.
        let reset = |pid: u32| fs::write(format!("/proc/{pid}/clear_refs"), "5");
        self.marks_hold = reset(self.root).is_ok();
        for pid in tree(self.root).into_iter().skip(1) {
            // It may have ended since.
            let _ = reset(pid);
        }
        self.peak = 0;
    }

    pub fn end_phase(&mut self) -> Option<PhaseFigures> {
        let reading = self.read();
        let marks: Vec<u64> = tree(self.root).into_iter().filter_map(|pid| status(pid, "VmHWM")).collect();
        let high_water = (self.marks_hold && !marks.is_empty()).then(|| marks.iter().sum());
        // Whatever its children had, the tree had at least what its root had at its own peak.
        let of_root = status(self.root, "VmHWM").filter(|_| self.marks_hold);
        let shared = self.shared.get(&self.root).copied().unwrap_or(0);
        let of_root = of_root.map_or(0, |mark| mark.saturating_sub(shared));
        let now = reading.as_ref().map_or(0, |reading| reading.total);
        let peak = self.peak.max(of_root).max(now);
        (peak > 0).then(|| PhaseFigures {
            peak,
            anonymous: reading.as_ref().map(|r| r.anonymous),
            file: reading.as_ref().map(|r| r.file),
            high_water,
        })
    }

    pub fn cgroup_peak(&mut self) -> Option<CgroupPeak> {
        self.cgroup.as_mut()?.peak()
    }

    fn read(&mut self) -> Option<Reading> {
        let begun = Instant::now();
        let mut reading = Reading::default();
        let mut shared = BTreeMap::new();
        let mut resident = 0;
        for pid in tree(self.root) {
            let Ok(rollup) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
            let value = |name| field(&rollup, name).unwrap_or(0);
            let pss = value("Pss");
            reading.total += pss;
            reading.anonymous += value("Pss_Anon");
            reading.file += value("Pss_File") + value("Pss_Shmem");
            resident += value("Rss");
            shared.insert(pid, value("Rss").saturating_sub(pss));
        }
        let took = begun.elapsed();
        self.next_reading = begun + took + (took * COST_DIVISOR).max(Duration::from_millis(1));
        if shared.is_empty() {
            return None;
        }
        if shared.len() == 1 {
            self.outside = resident.saturating_sub(reading.total);
        }
        reading.total += self.outside;
        reading.file += self.outside;
        if let Some(of_root) = shared.get_mut(&self.root) {
            *of_root = of_root.saturating_sub(self.outside);
        }
        self.shared = shared;
        self.resident_when_read = resident;
        Some(reading)
    }
}

/// CPU time of the thread that asks.
pub fn thread_cpu_seconds() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// The process and its descendants, whichever thread started them.
pub fn tree(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let children: Vec<u32> = tasks
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
            .flat_map(|pids| pids.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
            .collect();
        all.extend(children);
        next += 1;
    }
    all
}

/// Of `statm`, which costs a third of `status`.
fn resident(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn status(pid: u32, name: &str) -> Option<u64> {
    field(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, name)
}

/// A value in kB of a file of `Name:   123 kB` lines, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// A control group of version 2 that accounts for memory.
struct Cgroup {
    peak: File,
    since_start: bool,
}

impl Cgroup {
    /// `None` where there is none but the whole machine's.
    fn of(pid: u32, proc: &Path, root: &Path) -> Option<Self> {
        let groups = fs::read_to_string(proc.join(pid.to_string()).join("cgroup")).ok()?;
        let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        let path: PathBuf = root.join(group.trim_start_matches('/')).join("memory.peak");
        // Since Linux 6.12 a write makes what is read from the same open file begin anew.
        let writable = OpenOptions::new().read(true).write(true).open(&path).ok();
        let reset = writable.and_then(|mut file| file.write_all(b"reset\n").ok().map(|()| file));
        let since_start = reset.is_some();
        let peak = reset.or_else(|| File::open(&path).ok())?;
        Some(Self { peak, since_start })
    }

    fn peak(&mut self) -> Option<CgroupPeak> {
        let mut text = String::new();
        self.peak.rewind().ok()?;
        self.peak.read_to_string(&mut text).ok()?;
        let bytes = text.trim().parse().ok()?;
        Some(CgroupPeak { bytes, since_start: self.since_start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_of_a_control_group_is_found_by_the_process_and_absent_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let (proc, groups) = (root.path().join("proc"), root.path().join("cgroup"));
        fs::create_dir_all(proc.join("7")).unwrap();
        fs::create_dir_all(groups.join("job/one")).unwrap();
        fs::write(proc.join("7/cgroup"), "4:memory:/old\n0::/job/one\n").unwrap();
        assert!(Cgroup::of(7, &proc, &groups).is_none(), "no memory.peak");
        let peak = groups.join("job/one/memory.peak");
        fs::write(&peak, "123456789\n").unwrap();
        let mut permissions = fs::metadata(&peak).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&peak, permissions).unwrap();
        let mut cgroup = Cgroup::of(7, &proc, &groups).unwrap();
        // Root may write to a read-only file, which then is no kernel's.
        if !cgroup.since_start {
            let expected = CgroupPeak { bytes: 123_456_789, since_start: false };
            assert_eq!(cgroup.peak(), Some(expected));
        }
        assert!(Cgroup::of(8, &proc, &groups).is_none(), "no such process");
    }
}
