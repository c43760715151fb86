//! Piecewise-linear value functions: from a measured quantity to a score from 0 to 10.

use serde::{Deserialize, Serialize};

/// The best score.
pub const BEST: f64 = 10.0;

/// A point of a value function, with where it comes from, so that it can be argued with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    pub value: f64,
    pub score: f64,
    pub reason: String,
    pub source: String,
}

/// A piecewise-linear function through its anchors; outside them the nearest anchor's score holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct ValueFunction {
    /// By rising value.
    anchors: Vec<Anchor>,
}

impl ValueFunction {
    /// Takes the anchors in any order. The message names the anchor's key.
    pub fn new(mut anchors: Vec<Anchor>) -> Result<Self, String> {
        if anchors.len() < 2 {
            return Err("anchors: at least two are needed".into());
        }
        for (index, anchor) in anchors.iter().enumerate() {
            let fail = |problem: &str| Err(format!("anchors[{index}]: {problem}"));
            if !anchor.value.is_finite() {
                return fail("value must be a number");
            }
            if !(0.0..=BEST).contains(&anchor.score) {
                return fail("score must be from 0 to 10");
            }
            if anchor.reason.trim().is_empty() {
                return fail("reason is empty");
            }
            if anchor.source.trim().is_empty() {
                return fail("source is empty");
            }
        }
        anchors.sort_by(|a, b| a.value.total_cmp(&b.value));
        if let Some(pair) = anchors.windows(2).find(|pair| pair[0].value == pair[1].value) {
            return Err(format!("anchors: two have the value {}", pair[0].value));
        }
        Ok(Self { anchors })
    }

    pub fn score(&self, value: f64) -> f64 {
        let above = self.anchors.partition_point(|a| a.value < value);
        match (above.checked_sub(1).and_then(|i| self.anchors.get(i)), self.anchors.get(above)) {
            (Some(low), Some(high)) => {
                let part = (value - low.value) / (high.value - low.value);
                low.score + part * (high.score - low.score)
            }
            (Some(only), None) | (None, Some(only)) => only.score,
            (None, None) => unreachable!("there are at least two anchors"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn anchor(value: f64, score: f64) -> Anchor {
        Anchor { value, score, reason: "because".into(), source: "there".into() }
    }

    fn memory() -> ValueFunction {
        ValueFunction::new(vec![anchor(16.0, 0.0), anchor(6.0, 10.0)]).unwrap()
    }

    #[test]
    fn between_anchors_it_is_linear_and_outside_it_is_flat() {
        let f = memory();
        assert_eq!([6.0, 11.0, 16.0].map(|v| f.score(v)), [10.0, 5.0, 0.0]);
        assert_eq!([1.0, 40.0].map(|v| f.score(v)), [10.0, 0.0]);
        assert!((f.score(8.5) - 7.5).abs() < 1e-12);
    }

    #[test]
    fn each_piece_has_its_own_slope() {
        let f = ValueFunction::new(vec![anchor(0.0, 0.0), anchor(10.0, 8.0), anchor(20.0, 10.0)]).unwrap();
        assert_eq!([5.0, 10.0, 15.0].map(|v| f.score(v)), [4.0, 8.0, 9.0]);
    }

    #[test]
    fn impossible_anchors_are_refused_by_name() {
        let error = |anchors| ValueFunction::new(anchors).unwrap_err();
        assert!(error(vec![anchor(1.0, 1.0)]).contains("two"));
        assert!(error(vec![anchor(1.0, 1.0), anchor(1.0, 2.0)]).contains("value 1"));
        assert!(error(vec![anchor(1.0, 11.0), anchor(2.0, 2.0)]).contains("anchors[0]: score"));
        assert!(error(vec![anchor(1.0, 1.0), anchor(f64::NAN, 2.0)]).contains("anchors[1]: value"));
        let silent = Anchor { source: " ".into(), ..anchor(1.0, 1.0) };
        assert!(error(vec![silent, anchor(2.0, 2.0)]).contains("anchors[0]: source"));
    }

    proptest! {
        #[test]
        fn less_memory_never_scores_less(a in 0.0..40.0f64, b in 0.0..40.0f64) {
            let (less, more) = if a < b { (a, b) } else { (b, a) };
            prop_assert!(memory().score(less) >= memory().score(more));
        }
    }
}
