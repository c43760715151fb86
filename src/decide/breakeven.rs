//! At which weight of a criterion another engine would be first.

use serde::Serialize;

/// How far a criterion's weight may go, the others keeping their proportions, before the first one changes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BreakEven {
    /// In percent.
    pub weight: f64,
    /// The nearest weight below at which another draws level, and who; `None` if nobody does down to 0.
    pub below: Option<Level>,
    /// The same above, up to 100.
    pub above: Option<Level>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Level {
    /// In percent.
    pub weight: f64,
    pub engine: String,
}

/// Of each criterion. `engines` have a score in each, `weights` add up to 100, and `first` is who is first with them.
///
/// With the weight w of a criterion and the mean r of an engine in all others, by their weights, its total is
/// w·s + (1 - w)·r. Two totals a and b are level at w = (r_b - r_a) / ((s_a - s_b) + (r_b - r_a)).
pub fn break_even(engines: &[(&str, Vec<f64>)], weights: &[f64], first: usize) -> Vec<BreakEven> {
    (0..weights.len()).map(|criterion| of_criterion(engines, weights, first, criterion)).collect()
}

fn of_criterion(engines: &[(&str, Vec<f64>)], weights: &[f64], first: usize, criterion: usize) -> BreakEven {
    let stated = weights[criterion];
    let rest = 100.0 - stated;
    let mean_of_rest = |scores: &[f64]| -> f64 {
        let sum: f64 = scores.iter().zip(weights).map(|(score, weight)| score * weight).sum();
        (sum - scores[criterion] * stated) / rest
    };
    let (mut below, mut above): (Option<Level>, Option<Level>) = (None, None);
    let own = &engines[first].1;
    let others = engines.iter().enumerate().filter(|(i, _)| *i != first);
    for (_, (engine, scores)) in others {
        if rest <= 0.0 {
            break;
        }
        let behind = mean_of_rest(scores) - mean_of_rest(own);
        let weight = 100.0 * behind / (own[criterion] - scores[criterion] + behind);
        if !(0.0..=100.0).contains(&weight) {
            continue;
        }
        let level = Level { weight, engine: engine.to_string() };
        if weight <= stated && below.as_ref().is_none_or(|known| known.weight < weight) {
            below = Some(level);
        } else if weight > stated && above.as_ref().is_none_or(|known| known.weight > weight) {
            above = Some(level);
        }
    }
    BreakEven { weight: stated, below, above }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The scorecard that this project replaces: A has 8.7 and B 6.5. Of the first criterion alone A is better by 5, of the
    /// rest by (870 - 225 - (650 - 100)) / 75 = 1.27 on average: no weight turns it. In the last B is better by 2, and A by
    /// (870 - 80 - (650 - 100)) / 90 = 2.67 in the rest: level at 2.67 / 4.67.
    #[test]
    fn by_hand() {
        let engines = [("a", vec![9.0, 9.0, 8.0, 9.0, 8.0]), ("b", vec![4.0, 6.0, 6.0, 9.0, 10.0])];
        let found = break_even(&engines, &[25.0, 25.0, 20.0, 20.0, 10.0], 0);
        assert_eq!((&found[0].below, &found[0].above), (&None, &None));
        let above = found[4].above.as_ref().unwrap();
        assert!((above.weight - 100.0 * (240.0 / 90.0) / (240.0 / 90.0 + 2.0)).abs() < 1e-9, "{found:?}");
        assert_eq!(above.engine, "b");
    }

    proptest! {
        #[test]
        fn at_the_weight_both_are_level(
            scores in proptest::collection::vec((0.0..10.0f64, 0.0..10.0f64), 3),
            weights in proptest::collection::vec(1.0..100.0f64, 3),
        ) {
            let sum: f64 = weights.iter().sum();
            let weights: Vec<f64> = weights.iter().map(|w| 100.0 * w / sum).collect();
            let (a, b): (Vec<f64>, Vec<f64>) = scores.into_iter().unzip();
            let total = |scores: &[f64], weights: &[f64]| -> f64 {
                scores.iter().zip(weights).map(|(s, w)| s * w / 100.0).sum()
            };
            let first = usize::from(total(&b, &weights) > total(&a, &weights));
            let engines = [("a", a.clone()), ("b", b.clone())];
            for (k, found) in break_even(&engines, &weights, first).into_iter().enumerate() {
                for level in [found.below, found.above].into_iter().flatten() {
                    let rest = (100.0 - level.weight) / (100.0 - weights[k]);
                    let moved: Vec<f64> =
                        (0..3).map(|i| if i == k { level.weight } else { weights[i] * rest }).collect();
                    prop_assert!((total(&a, &moved) - total(&b, &moved)).abs() < 1e-6);
                }
            }
        }
    }
}
