//! How much the outcome hangs on a weight, and which options lose whatever the weights are.

use super::check::{EPSILON, Interval};
use super::{Scale, Scorecard};
use serde::Serialize;

/// The weights of one criterion at which the winner changes while the others keep their proportions.
///
/// Let s be the scores of an option, w the weights with sum 1, k the criterion. With its weight moved to t, the others
/// are w_j (1 − t) / (1 − w_k), and the total is t s_k + (1 − t) R with R = Σ_{j≠k} w_j s_j / (1 − w_k). The lead of
/// the winner a over b is t (s_ak − s_bk) + (1 − t) (R_a − R_b). It is 0 at t = D / (D − d), where d = s_ak − s_bk and
/// D = R_a − R_b; that lies between 0 and 1 if d and D have opposite signs, and nowhere else does b overtake a.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BreakEven {
    pub criterion: String,
    /// Share of 1.
    pub weight: f64,
    /// The nearest change below the weight, and above it.
    pub below: Option<Turn>,
    pub above: Option<Turn>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Turn {
    /// Share of 1.
    pub weight: f64,
    /// Who draws level there, and is ahead beyond it.
    pub winners: Vec<String>,
}

/// `None` where a score is missing, or more than one option is ahead: then there is no winner to lose its place.
pub fn break_even(card: &Scorecard, totals: &[Interval]) -> Option<Vec<BreakEven>> {
    let scores: Vec<Vec<f64>> = card
        .options
        .iter()
        .map(|o| o.scores.iter().map(|s| s.value).collect::<Option<_>>())
        .collect::<Option<_>>()?;
    let best = totals.iter().map(|t| t.high).fold(f64::NEG_INFINITY, f64::max);
    let ahead: Vec<usize> = (0..totals.len()).filter(|i| totals[*i].high >= best - EPSILON).collect();
    let [leader] = ahead[..] else { return None };
    let sum = card.weight_total();
    let weights: Vec<f64> = card.criteria.iter().map(|c| c.weight / sum).collect();
    Some((0..weights.len()).map(|k| of_criterion(card, &scores, &weights, leader, k)).collect())
}

fn of_criterion(
    card: &Scorecard,
    scores: &[Vec<f64>],
    weights: &[f64],
    leader: usize,
    k: usize,
) -> BreakEven {
    let rest = 1.0 - weights[k];
    let others = |option: usize| -> f64 {
        (0..weights.len()).filter(|j| *j != k).map(|j| weights[j] * scores[option][j]).sum::<f64>() / rest
    };
    // With the whole weight on one criterion there are no proportions to keep.
    let rivals = (0..scores.len()).filter(|o| *o != leader && rest > EPSILON);
    let turns: Vec<(f64, &str)> = rivals
        .filter_map(|rival| {
            let here = scores[leader][k] - scores[rival][k];
            let elsewhere = others(leader) - others(rival);
            let opposite = here.abs() > EPSILON && elsewhere.abs() > EPSILON && here * elsewhere < 0.0;
            opposite.then(|| (elsewhere / (elsewhere - here), card.options[rival].name.as_str()))
        })
        .collect();
    let at = |t: f64| {
        let level = turns.iter().filter(|(turn, _)| (turn - t).abs() <= EPSILON);
        t.is_finite()
            .then(|| Turn { weight: t, winners: level.map(|(_, name)| (*name).to_owned()).collect() })
    };
    let places = || turns.iter().map(|(t, _)| *t);
    BreakEven {
        criterion: card.criteria[k].name.clone(),
        weight: weights[k],
        below: at(places().filter(|t| *t < weights[k]).fold(f64::NEG_INFINITY, f64::max)),
        above: at(places().filter(|t| *t > weights[k]).fold(f64::INFINITY, f64::min)),
    }
}

/// The first option that is at least as good in every criterion, and better in one, whatever is missing.
pub fn dominator(card: &Scorecard, option: usize) -> Option<usize> {
    let range = |o: usize, k: usize| range(&card.options[o].scores[k].value, card.scale);
    let dominates = |other: usize| {
        let pairs = || (0..card.criteria.len()).map(|k| (range(other, k), range(option, k)));
        pairs().all(|(other, own)| other.low >= own.high) && pairs().any(|(other, own)| other.low > own.high)
    };
    (0..card.options.len()).filter(|other| *other != option).find(|other| dominates(*other))
}

pub fn range(score: &Option<f64>, scale: Scale) -> Interval {
    score.map_or(Interval { low: scale.low, high: scale.high }, |s| Interval { low: s, high: s })
}
