//! Which of the kernels that burn has for a product of matrices is the fastest on this GPU, found by measuring.
//!
//! Burn can do that by itself, by a cargo feature, but then it does so at any time, on the clock and on software
//! adapters, where one kernel can take minutes, and keeps what it found only with a database compiled in. So its own
//! choice is left out, and cubecl's tuner measures the same kernels here: only while [`Tuner::measure`] says so, and not
//! on a software adapter. What was found is kept in the user's cache folder.
//!
//! | module | idea |
//! |---|---|
//! | `problem` | products that are measured once and then alike |
//! | `candidate` | the kernels that are measured |
//! | `store` | what was found on an adapter, on disk |

mod candidate;
mod problem;
mod store;

use crate::guard::guard;
use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_wgpu::CubeTensor;
use candidate::Candidate;
use cubecl::tune::{LocalTuner, Tunable, TunableSet, TuneGroup, local_tuner};
use evalfw_engine::protocol::{DeviceInfo, Tuning};
use evalfw_engine::{Error, Result};
use problem::Problem;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;
use store::Store;

/// When burn-wgpu measures, and where it keeps what it found.
#[derive(Debug, Clone, Default)]
pub struct Autotune {
    pub when: When,
    /// evalfw's cache folder. Without one every process measures anew.
    pub cache: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum When {
    /// On all but software adapters.
    #[default]
    Hardware,
    Always,
    Never,
}

/// The choices for the GPU of this process: there is only one.
pub struct Tuner {
    store: Option<Store>,
    adapter: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    choices: HashMap<Problem, Choice>,
    measuring: bool,
    measured: u64,
    /// Of `measured`, what was given to the store.
    kept: u64,
    seconds: f64,
}

#[derive(Debug, Clone, Copy)]
struct Choice {
    /// `None`: burn's default, as nothing was measured.
    kernel: Option<Candidate>,
    origin: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Measured,
    /// On disk when the process began.
    Stored,
    /// The same, and asked for since the model was loaded.
    Used,
    /// It came first when nothing may be measured any more.
    Late,
}

static TUNER: OnceLock<Option<Tuner>> = OnceLock::new();

type Inputs = (CubeTensor, CubeTensor, CubeTensor);
static MEASUREMENTS: LocalTuner<Problem, String> = local_tuner!("evalfw-product");

impl Tuner {
    /// Decides for this process, once, whether there is one.
    pub fn install(autotune: &Autotune, device: &DeviceInfo) -> Option<&'static Self> {
        let wanted = match autotune.when {
            When::Hardware => !device.software,
            When::Always => true,
            When::Never => false,
        };
        TUNER.get_or_init(|| wanted.then(|| Self::new(autotune, device))).as_ref()
    }

    pub fn get() -> Option<&'static Self> {
        TUNER.get()?.as_ref()
    }

    fn new(autotune: &Autotune, device: &DeviceInfo) -> Self {
        let store = autotune.cache.as_deref().map(|cache| Store::of(cache, device));
        let stored = store.as_ref().map(Store::read).unwrap_or_default();
        let choice = |(problem, kernel)| (problem, Choice { kernel: Some(kernel), origin: Origin::Stored });
        let state = State { choices: stored.into_iter().map(choice).collect(), ..State::default() };
        Self { store, adapter: device.name.clone(), state: Mutex::new(state) }
    }

    /// Lets products be measured that were not so far, or ends that and keeps what was found.
    pub fn measure(&self, on: bool) {
        let mut state = self.state();
        state.measuring = on;
        if on || state.measured == state.kept {
            return;
        }
        state.kept = state.measured;
        let found = state.choices.iter().filter(|(_, choice)| choice.origin != Origin::Late);
        let found = found.filter_map(|(problem, choice)| Some((problem.clone(), choice.kernel?))).collect();
        if let Some(store) = &self.store
            && let Err(error) = store.write(found)
        {
            // The run is as good without; the next one measures again.
            eprintln!("what was measured of burn's kernels is not kept: {error}");
        }
    }

    /// Counts anew what is used and what comes too late: what ran before there was a model is not what a scenario runs.
    pub fn begin(&self) {
        let mut state = self.state();
        state.choices.retain(|_, choice| choice.origin != Origin::Late);
        for choice in state.choices.values_mut().filter(|choice| choice.origin == Origin::Used) {
            choice.origin = Origin::Stored;
        }
    }

    pub fn figures(&self) -> Tuning {
        let state = self.state();
        let count = |origin| state.choices.values().filter(|choice| choice.origin == origin).count() as u64;
        Tuning {
            measured: state.measured,
            cached: count(Origin::Used),
            late: count(Origin::Late),
            seconds: state.seconds,
        }
    }

    /// `lhs [.., rows, inner] · rhs [.., inner, columns]`, by the kernel for products like this.
    pub fn multiply(&self, lhs: CubeTensor, rhs: CubeTensor) -> CubeTensor {
        let Some(problem) = Problem::of(&lhs, &rhs) else { return Cube::float_matmul(lhs, rhs) };
        match self.choice(&problem) {
            Some(None | Some(Candidate::Default)) => Cube::float_matmul(lhs, rhs),
            Some(Some(kernel)) => {
                let out = problem::output(&lhs, &rhs);
                // A kernel may refuse a shape that is only like the one that was measured.
                match kernel.launch(lhs.clone(), rhs.clone(), out.clone()) {
                    Ok(()) => out,
                    Err(_) => Cube::float_matmul(lhs, rhs),
                }
            }
            None => self.find(problem, lhs, rhs),
        }
    }

    /// `None` where it is to be measured.
    fn choice(&self, problem: &Problem) -> Option<Option<Candidate>> {
        let mut state = self.state();
        let measuring = state.measuring;
        match state.choices.get_mut(problem) {
            Some(Choice { origin: Origin::Late, .. }) if measuring => None,
            Some(choice) => {
                if choice.origin == Origin::Stored {
                    choice.origin = Origin::Used;
                }
                Some(choice.kernel)
            }
            None if measuring => None,
            None => {
                state.choices.insert(problem.clone(), Choice { kernel: None, origin: Origin::Late });
                Some(None)
            }
        }
    }

    /// Measures all kernels on these inputs, and returns the product by the fastest.
    fn find(&self, problem: Problem, lhs: CubeTensor, rhs: CubeTensor) -> CubeTensor {
        let start = Instant::now();
        let out = problem::output(&lhs, &rhs);
        let fastest = guard(|| Ok(self.fastest(&problem, (lhs.clone(), rhs.clone(), out.clone()))));
        let expected = Cube::float_matmul(lhs.clone(), rhs.clone());
        // A kernel that is fast and wrong is none.
        let right = |_: &Candidate| guard(|| is_close(out.clone(), expected.clone())).unwrap_or(false);
        let kernel = fastest.ok().flatten().filter(right).unwrap_or(Candidate::Default);
        let mut state = self.state();
        state.choices.insert(problem, Choice { kernel: Some(kernel), origin: Origin::Measured });
        state.measured += 1;
        state.seconds += start.elapsed().as_secs_f64();
        match kernel {
            Candidate::Default => expected,
            _ => out,
        }
    }

    /// Leaves the product by the fastest kernel in the last of `inputs`.
    fn fastest(&self, problem: &Problem, inputs: Inputs) -> Option<Candidate> {
        let set = MEASUREMENTS.init(&self.adapter, candidates);
        let client = inputs.0.client.clone();
        MEASUREMENTS.execute(&self.adapter, &client, Arc::clone(&set), inputs);
        MEASUREMENTS.fastest_identity(&self.adapter, &set, problem)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn candidates() -> TunableSet<Problem, Inputs, (), Candidate> {
    let problem = |(lhs, rhs, _): &Inputs| Problem::of(lhs, rhs).expect("only such products are measured");
    let scratch = |_: &Problem, (lhs, rhs, out): &Inputs| (lhs.clone(), rhs.clone(), out.copy());
    let all = TuneGroup::new("kernels", |_: &Problem| 0);
    let tunable = |kernel: Candidate| {
        Tunable::identified(kernel, move |(lhs, rhs, out): Inputs| kernel.launch(lhs, rhs, out))
            .group(&all, move |problem: &Problem| if kernel.suits(problem) { 0 } else { -1 })
    };
    Candidate::ALL.into_iter().map(tunable).fold(TunableSet::new(problem, scratch), TunableSet::with)
}

/// Of the largest value. Kernels add up in other orders: products of 4096 terms of one size differ by 1e-5 of it.
const TOLERANCE: f32 = 1e-3;

fn is_close(found: CubeTensor, expected: CubeTensor) -> Result<bool> {
    let (found, expected) = (values(found)?, values(expected)?);
    let largest = expected.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    // Not so where any is no number.
    Ok(found.len() == expected.len()
        && found.iter().zip(&expected).all(|(f, e)| (f - e).abs() <= TOLERANCE * largest))
}

fn values(tensor: CubeTensor) -> Result<Vec<f32>> {
    debug_assert_eq!(tensor.dtype, DType::F32);
    let data = cubecl::future::block_on(Cube::float_into_data(tensor)).map_err(Error::framework)?;
    data.try_into_vec().map_err(|error| Error::framework(format_args!("{error:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BurnDevice;
    use crate::device::{OpenDevice, all_for_tests};
    use burn::backend::{DispatchDevice, TensorMetadata};
    use burn::tensor::TensorData;

    fn wgpu() -> Option<OpenDevice> {
        all_for_tests().into_iter().find(|device| device.kind == BurnDevice::Wgpu)
    }

    /// Of values that a sum tells apart, `[rows, inner]`.
    fn matrix(rows: usize, inner: usize, device: &OpenDevice) -> CubeTensor {
        let values: Vec<f32> = (0..rows * inner).map(|i| (i as f32 * 0.37).sin()).collect();
        let data = TensorData::new(values, [rows, inner]);
        let DispatchDevice::Cube(cube) = device.device.as_dispatch() else { panic!("not a GPU") };
        Cube::float_from_data(data, cube)
    }

    /// By the definition, in f64.
    fn assert_product(found: CubeTensor, lhs: CubeTensor, rhs: CubeTensor) {
        let ([rows, inner], columns) = ([lhs.shape()[0], lhs.shape()[1]], rhs.shape()[1]);
        let (found, lhs, rhs) = (values(found).unwrap(), values(lhs).unwrap(), values(rhs).unwrap());
        assert_eq!(found.len(), rows * columns);
        for (at, found) in found.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let term = |k: usize| f64::from(lhs[row * inner + k]) * f64::from(rhs[k * columns + column]);
            let expected: f64 = (0..inner).map(term).sum();
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{at}: {found} {expected}");
        }
    }

    #[test]
    fn nothing_is_measured_but_when_it_may_be_and_what_was_is_known_to_the_next() {
        let Some(device) = wgpu() else { return };
        let cache = tempfile::tempdir().unwrap();
        let autotune = Autotune { when: When::Always, cache: Some(cache.path().to_owned()) };
        // A vector has the kernels that compile fastest.
        let multiply = |tuner: &Tuner, columns: usize| {
            let (lhs, rhs) = (matrix(1, 24, &device), matrix(24, columns, &device));
            assert_product(tuner.multiply(lhs.clone(), rhs.clone()), lhs, rhs);
        };

        let first = Tuner::new(&autotune, &device.info);
        first.measure(true);
        multiply(&first, 40);
        first.measure(false);
        let measured = first.figures();
        assert_eq!((measured.measured, measured.cached, measured.late), (1, 0, 0));
        assert!(measured.seconds > 0.0);
        // The same kind, twice, and another.
        for columns in [60, 64, 5] {
            multiply(&first, columns);
        }
        assert_eq!(first.figures(), Tuning { late: 1, ..measured });

        let second = Tuner::new(&autotune, &device.info);
        assert_eq!(second.figures(), Tuning::default());
        second.measure(true);
        multiply(&second, 64);
        second.measure(false);
        assert_eq!(second.figures(), Tuning { cached: 1, ..Tuning::default() });
    }

    /// One row, one column, several pairs, a transposed factor, and none to multiply.
    #[test]
    fn every_kind_of_kernel_that_is_chosen_gives_the_product() {
        let Some(device) = wgpu() else { return };
        let tuner = Tuner::new(&Autotune::default(), &device.info);
        tuner.measure(true);
        for [rows, inner, columns] in [[1, 40, 33], [33, 40, 1], [7, 64, 9]] {
            let (lhs, rhs) = (matrix(rows, inner, &device), matrix(columns, inner, &device));
            let rhs = Cube::float_transpose(rhs);
            for _ in 0..2 {
                let found = tuner.multiply(lhs.clone(), rhs.clone());
                let rhs = Cube::float_add_scalar(rhs.clone(), 0f32.into());
                assert_product(found, lhs.clone(), rhs);
            }
        }
        assert_eq!(tuner.figures().measured, 3);
    }
}
