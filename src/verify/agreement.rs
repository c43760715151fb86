//! NF4 losses of engines against each other: all decode the same bits, so that only the order of their
//! sums may set them apart.

use super::compare::{Deviation, relative};
use super::{Check, Verdict};
use crate::record::Outcome;
use std::collections::BTreeMap;

/// What is compared, as it is called in a check.
const NAME: &str = "NF4: losses equal across engines";

/// One check for each reference model that more than one of the engines evaluated in NF4; `None` where
/// there is none.
pub fn across(verdicts: &[Verdict]) -> Option<Verdict> {
    let mut engines: Vec<&str> = Vec::new();
    let mut models: BTreeMap<&str, (Vec<Deviation>, f64)> = BTreeMap::new();
    for (index, one) in verdicts.iter().enumerate() {
        for other in &verdicts[index + 1..] {
            let (Some(a), Some(b)) = (&one.tolerances, &other.tolerances) else { continue };
            let tolerance = a.between_engines.max(b.between_engines);
            for (key, losses) in &one.nf4_losses {
                let Some(others) = other.nf4_losses.get(key) else { continue };
                let (model, check) = key;
                let (deviations, loosest) = models.entry(model).or_insert((Vec::new(), tolerance));
                *loosest = loosest.max(tolerance);
                let between = format!("{} and {}, {check}", one.engine, other.engine);
                deviations.push(largest_distance(losses, others, &between));
                for engine in [one.engine.as_str(), other.engine.as_str()] {
                    if !engines.contains(&engine) {
                        engines.push(engine);
                    }
                }
            }
        }
    }
    let checks: Vec<Check> = models
        .into_iter()
        .map(|(model, (deviations, tolerance))| {
            Check::new(model, NAME.to_owned(), Deviation::largest(deviations), tolerance)
        })
        .collect();
    if checks.is_empty() {
        return None;
    }
    let outcome = if checks.iter().all(|c| c.passed) { Outcome::Ok } else { Outcome::Wrong };
    Some(Verdict { checks, outcome, ..Verdict::new(&engines.join(", ")) })
}

fn largest_distance(losses: &[f64], others: &[f64], between: &str) -> Deviation {
    if losses.len() != others.len() {
        return Deviation::new(f64::INFINITY, format!("{between}: another number of losses"));
    }
    Deviation::largest(losses.iter().zip(others).enumerate().map(|(line, (a, b))| {
        Deviation::new(relative(*a, *b), format!("{between}, batch {line}: {a:.6} and {b:.6}"))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::tolerance::Tolerances;

    fn verdict(engine: &str, compute_dtype: &str, losses: &[f64]) -> Verdict {
        let mut verdict = Verdict::new(engine);
        verdict.tolerances = Some(Tolerances::of(compute_dtype).unwrap());
        verdict.nf4_losses.insert(("tiny".into(), "losses".into()), losses.to_vec());
        verdict
    }

    #[test]
    fn the_largest_distance_between_any_two_engines_decides() {
        let near = verdict("a", "f32", &[2.0, 3.0]);
        let also = verdict("b", "f32", &[2.0, 3.000_001]);
        let far = verdict("c", "f32", &[2.0, 3.003]);
        assert!(across(&[near, also]).unwrap().passed());
        let all = [verdict("a", "f32", &[2.0, 3.0]), verdict("b", "f32", &[2.0, 3.000_001]), far];
        let wrong = across(&all).unwrap();
        assert_eq!((wrong.outcome, wrong.engine.as_str()), (Outcome::Wrong, "a, b, c"));
        let check = &wrong.checks[0];
        assert!((check.deviation - 1e-3).abs() < 1e-5, "{}", check.deviation);
        assert!(check.detail.contains("a and c") && check.detail.contains("batch 1"), "{}", check.detail);
    }

    #[test]
    fn a_lower_precision_widens_the_tolerance() {
        let pair = [verdict("a", "f32", &[3.0]), verdict("b", "bf16", &[3.003])];
        assert!(across(&pair).unwrap().passed());
    }

    #[test]
    fn one_engine_alone_has_nothing_to_agree_with_and_missing_losses_are_no_agreement() {
        assert!(across(&[verdict("a", "f32", &[3.0])]).is_none());
        let pair = [verdict("a", "f32", &[3.0, 4.0]), verdict("b", "f32", &[3.0])];
        assert!(!across(&pair).unwrap().passed());
    }
}
