//! Statistics over samples.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 4000;
/// The same samples give the same interval.
const SEED: u64 = 0;

/// The middle value, or the mean of the two middle ones; `None` without values or with one that is not
/// finite.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    if values.is_empty() || values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 })
}

/// A ratio of two medians, and its bootstrap interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    pub ratio: f64,
    pub low: f64,
    pub high: f64,
}

/// The samples of some processes: all of one process are alike in what processes differ in, such as the place of memory.
pub type Processes = Vec<Vec<f64>>;

/// The median over the processes of the median of each.
pub fn median_of_processes(processes: &Processes) -> Option<f64> {
    let medians: Option<Vec<f64>> = processes.iter().map(|samples| median(samples.iter().copied())).collect();
    median(medians?)
}

/// `head / base` of [`median_of_processes`], with the percentile interval of a bootstrap in two levels: processes are
/// drawn with replacement, and then of each as many samples as it has (Davison and Hinkley, Bootstrap Methods and their
/// Application, 1997, section 3.8). `None` where a side has no median above 0, or a
/// ratio is beyond all numbers.
pub fn ratio_of_medians(base: &Processes, head: &Processes, confidence: f64) -> Option<Ratio> {
    let above_0 = |processes: &Processes| median_of_processes(processes).filter(|median| *median > 0.0);
    let ratio = Some(above_0(head)? / above_0(base)?).filter(|ratio| ratio.is_finite() && *ratio > 0.0)?;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut ratios = (0..RESAMPLES)
        .map(|_| Some(above_0(&resampled(head, &mut rng))? / above_0(&resampled(base, &mut rng))?))
        .collect::<Option<Vec<f64>>>()?;
    if !ratios.iter().all(|ratio| ratio.is_finite()) {
        return None;
    }
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[(share * (RESAMPLES - 1) as f64).round() as usize];
    let outside = (1.0 - confidence) / 2.0;
    Some(Ratio { ratio, low: at(outside), high: at(1.0 - outside) })
}

fn resampled(processes: &Processes, rng: &mut impl Rng) -> Processes {
    fn drawn<'a, T>(values: &'a [T], rng: &mut impl Rng) -> &'a T {
        &values[rng.random_range(..values.len())]
    }
    let process = |_| {
        let samples = drawn(processes, rng);
        samples.iter().map(|_| *drawn(samples, rng)).collect()
    };
    (0..processes.len()).map(process).collect()
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_of_odd_even_and_impossible_samples() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
        assert_eq!(median([1.0, f64::INFINITY]), None);
    }
}
