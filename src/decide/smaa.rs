//! SMAA-2: how often each alternative takes each rank, over many draws of the weights and of what was measured.
//!
//! After R. Lahdelma and P. Salminen, "SMAA-2: Stochastic Multicriteria Acceptability Analysis for Group Decision
//! Making", Operations Research 49(3), 2001: rank acceptability indices, central weight vectors and confidence factors.
//! What was measured is drawn by a bootstrap over the processes; what was not is drawn from all that it can be, alike.
//! The weights of the quantities within a criterion are as much a choice as those of the criteria, and are drawn as they.

use super::criteria::{Criterion, Rule, Source};
use super::metric::Metric;
use super::score::{Basis, Interval, Score};
use super::value::{BEST, ValueFunction};
use crate::stats::median;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::cmp::Ordering;

/// An engine with what its scores are drawn from, in the order of the criteria.
pub struct Alternative<'a> {
    pub engine: &'a str,
    scores: Vec<ScoreSource<'a>>,
}

/// What a score is drawn from.
enum ScoreSource<'a> {
    Certain(f64),
    Between(Interval),
    /// Each with its weight in percent of the criterion.
    Parts(Vec<(f64, PartSource<'a>)>),
}

enum PartSource<'a> {
    Unknown,
    Processes { metric: Metric, figures: &'a [f64], anchors: &'a ValueFunction },
}

impl<'a> Alternative<'a> {
    pub fn new(engine: &'a str, criteria: &'a [Criterion], scores: &'a [Score]) -> Self {
        let scores = criteria.iter().zip(scores).map(|(criterion, score)| source(criterion, score)).collect();
        Self { engine, scores }
    }

    /// With scores that are known for sure.
    #[cfg(test)]
    fn certain(engine: &'a str, scores: &[f64]) -> Self {
        Self { engine, scores: scores.iter().map(|score| ScoreSource::Certain(*score)).collect() }
    }

    fn draw(&self, rng: &mut impl Rng) -> Drawn {
        Drawn(self.scores.iter().map(|source| source.draw(rng)).collect())
    }
}

/// Of each criterion the scores of its parts, or the one that it has.
struct Drawn(Vec<Vec<f64>>);

impl Drawn {
    /// The scores of the criteria with these weights of their parts.
    fn scores(&self, parts: &[Vec<f64>]) -> Vec<f64> {
        let score = |(scores, weights): (&Vec<f64>, &Vec<f64>)| match scores.as_slice() {
            [only] => *only,
            parts => parts.iter().zip(weights).map(|(score, weight)| score * weight / 100.0).sum(),
        };
        self.0.iter().zip(parts).map(score).collect()
    }
}

/// The weights of the parts of each criterion, in percent of it; none of a criterion that no alternative has parts of.
fn part_weights(alternatives: &[Alternative], criteria: usize) -> Vec<Vec<f64>> {
    let of = |criterion: usize| {
        let sources = alternatives.iter().map(|a| &a.scores[criterion]);
        let parts = sources.filter_map(|source| match source {
            ScoreSource::Parts(parts) => Some(parts.iter().map(|(weight, _)| *weight).collect()),
            _ => None,
        });
        parts.into_iter().next().unwrap_or_default()
    };
    (0..criteria).map(of).collect()
}

fn source<'a>(criterion: &'a Criterion, score: &'a Score) -> ScoreSource<'a> {
    match (&criterion.source, score) {
        (Source::Metrics { parts }, Score::Measured { basis: Basis::Metrics { parts: scores }, .. }) => {
            let part = |(part, score): (&'a super::criteria::Part, &'a super::score::PartScore)| {
                let from = match &score.measured {
                    None => PartSource::Unknown,
                    Some(measured) => PartSource::Processes {
                        metric: part.metric,
                        figures: &measured.processes,
                        anchors: &part.anchors,
                    },
                };
                (part.weight, from)
            };
            ScoreSource::Parts(parts.iter().zip(scores).map(part).collect())
        }
        _ => {
            let range = score.range();
            if range.low == range.high {
                ScoreSource::Certain(range.low)
            } else {
                ScoreSource::Between(range)
            }
        }
    }
}

impl ScoreSource<'_> {
    fn draw(&self, rng: &mut impl Rng) -> Vec<f64> {
        match self {
            Self::Certain(score) => vec![*score],
            Self::Between(range) => vec![range.low + (range.high - range.low) * rng.random::<f64>()],
            Self::Parts(parts) => parts.iter().map(|(_, part)| part.draw(rng)).collect(),
        }
    }
}

impl PartSource<'_> {
    fn draw(&self, rng: &mut impl Rng) -> f64 {
        match self {
            Self::Unknown => BEST * rng.random::<f64>(),
            Self::Processes { metric, figures, anchors } => {
                let drawn: Vec<f64> =
                    figures.iter().map(|_| figures[rng.random_range(..figures.len())]).collect();
                metric.combined(&drawn).map_or(0.0, |value| anchors.score(value))
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Acceptability {
    pub draws: usize,
    pub seed: u64,
    /// In the order of the alternatives.
    pub engines: Vec<EngineAcceptability>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineAcceptability {
    pub engine: String,
    /// In which share of the draws it is first, second and so on, with weights around the stated ones, those of the
    /// quantities within a criterion too. Alternatives of one total share their ranks.
    pub ranks: Vec<f64>,
    /// In which share of the draws it is first with the weights exactly as stated.
    pub first_as_stated: f64,
    /// In which share it is first if nothing is known of the weights.
    pub first_with_any_weights: f64,
    /// The mean of the weights with which it is first, in percent, of all that there are; `None` if there are none.
    pub central_weights: Option<Vec<f64>>,
    /// In which share of the draws of what was measured it is first with those.
    pub confidence: Option<f64>,
    /// Half of the draws are above it: its total less the best of the others, with the weights as stated.
    pub ahead: f64,
}

impl EngineAcceptability {
    /// From the one that is first most often on; of those that are first equally often the one that is second more often
    /// comes before, and so on.
    pub fn order(&self, other: &Self) -> Ordering {
        let ranks = self.ranks.iter().zip(&other.ranks);
        ranks
            .map(|(own, of_other)| of_other.total_cmp(own))
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }
}

/// Weights in percent, in the order of the criteria.
pub fn acceptability(alternatives: &[Alternative], weights: &[f64], rule: &Rule) -> Acceptability {
    let count = alternatives.len();
    let mut rng = ChaCha8Rng::seed_from_u64(rule.seed);
    let mut ranks = vec![vec![0.0; count]; count];
    let (mut as_stated, mut any) = (vec![0.0; count], vec![0.0; count]);
    let mut central = vec![vec![0.0; weights.len()]; count];
    let mut ahead: Vec<Vec<f64>> = vec![Vec::with_capacity(rule.draws); count];
    let parts = part_weights(alternatives, weights.len());
    for _ in 0..rule.draws {
        let drawn: Vec<Drawn> = alternatives.iter().map(|a| a.draw(&mut rng)).collect();
        let with_parts =
            |parts: &[Vec<f64>]| drawn.iter().map(|d| d.scores(parts)).collect::<Vec<Vec<f64>>>();
        let around_parts: Vec<Vec<f64>> =
            parts.iter().map(|parts| around(parts, rule.weight_factor, &mut rng)).collect();
        let scores = with_parts(&around_parts);
        let around = around(weights, rule.weight_factor, &mut rng);
        for (engine, shares) in rank_shares(&totals(&scores, &around)).into_iter().enumerate() {
            ranks[engine].iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
        }
        let stated = totals(&with_parts(&parts), weights);
        add(&mut as_stated, first_shares(&stated));
        for (engine, of_engine) in ahead.iter_mut().enumerate() {
            of_engine.push(lead(&stated, engine));
        }
        let free = any_weights(weights.len(), &mut rng);
        for (engine, share) in first_shares(&totals(&scores, &free)).into_iter().enumerate() {
            any[engine] += share;
            central[engine].iter_mut().zip(&free).for_each(|(sum, weight)| *sum += share * weight);
        }
    }
    let draws = rule.draws as f64;
    let engines = alternatives.iter().enumerate().map(|(engine, alternative)| {
        let central_weights = (any[engine] > 0.0)
            .then(|| central[engine].iter().map(|sum| sum / any[engine]).collect::<Vec<f64>>());
        EngineAcceptability {
            engine: alternative.engine.to_owned(),
            ranks: ranks[engine].iter().map(|sum| sum / draws).collect(),
            first_as_stated: as_stated[engine] / draws,
            first_with_any_weights: any[engine] / draws,
            confidence: central_weights.as_ref().map(|w| confidence(alternatives, engine, w, rule)),
            central_weights,
            ahead: median(ahead[engine].iter().copied()).unwrap_or(0.0),
        }
    });
    Acceptability { draws: rule.draws, seed: rule.seed, engines: engines.collect() }
}

/// How often an alternative is first with these weights.
fn confidence(alternatives: &[Alternative], engine: usize, weights: &[f64], rule: &Rule) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(rule.seed);
    let parts = part_weights(alternatives, weights.len());
    let first = (0..rule.draws).map(|_| {
        let scores: Vec<Vec<f64>> = alternatives.iter().map(|a| a.draw(&mut rng).scores(&parts)).collect();
        first_shares(&totals(&scores, weights))[engine]
    });
    first.sum::<f64>() / rule.draws as f64
}

/// From 0 to 10, with weights that add up to 100.
fn totals(scores: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let total = |scores: &Vec<f64>| scores.iter().zip(weights).map(|(s, w)| s * w / 100.0).sum();
    scores.iter().map(total).collect()
}

/// Totals that differ by rounding alone are the same.
const SAME: f64 = 1e-9;

/// Of each alternative the share of each rank: 1 in its own, or parts of those that it shares.
fn rank_shares(totals: &[f64]) -> Vec<Vec<f64>> {
    let shares = |own: &f64| {
        let above = totals.iter().filter(|other| **other > own + SAME).count();
        let level = totals.iter().filter(|other| (**other - own).abs() <= SAME).count();
        let share = |rank: usize| match (above..above + level).contains(&rank) {
            true => 1.0 / level as f64,
            false => 0.0,
        };
        (0..totals.len()).map(share).collect()
    };
    totals.iter().map(shares).collect()
}

fn first_shares(totals: &[f64]) -> Vec<f64> {
    rank_shares(totals).into_iter().map(|shares| shares[0]).collect()
}

fn lead(totals: &[f64], engine: usize) -> f64 {
    let others = totals.iter().enumerate().filter(|(i, _)| *i != engine).map(|(_, total)| *total);
    totals[engine] - others.fold(f64::NEG_INFINITY, f64::max)
}

fn add(sums: &mut [f64], values: Vec<f64>) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// Each stated weight, made up to `factor` times larger or smaller, and all scaled to 100 again.
fn around(stated: &[f64], factor: f64, rng: &mut impl Rng) -> Vec<f64> {
    let changed = |weight: &f64| {
        let times = 1.0 + (factor - 1.0) * rng.random::<f64>();
        if rng.random::<bool>() { weight * times } else { weight / times }
    };
    scaled(stated.iter().map(changed).collect())
}

/// Any weights, all alike: the gaps between sorted numbers that are drawn from 0 to 100.
fn any_weights(count: usize, rng: &mut impl Rng) -> Vec<f64> {
    let mut cuts: Vec<f64> = (1..count).map(|_| 100.0 * rng.random::<f64>()).collect();
    cuts.sort_by(f64::total_cmp);
    cuts.push(100.0);
    let mut last = 0.0;
    cuts.into_iter().map(|cut| cut - std::mem::replace(&mut last, cut)).collect()
}

fn scaled(weights: Vec<f64>) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| 100.0 * weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 0.015
    }

    /// Two criteria, A is better by 6 in the one and B by 3 in the other: with any weights A is first where 6 w > 3 (1 - w),
    /// which is w > 1/3, and its central weight is the middle of 1/3 to 1.
    #[test]
    fn two_alternatives_by_hand() {
        let alternatives = [Alternative::certain("a", &[9.0, 4.0]), Alternative::certain("b", &[3.0, 7.0])];
        let rule = Rule { weight_factor: 1.0, ..Rule::default() };
        let found = acceptability(&alternatives, &[20.0, 80.0], &rule);
        let [a, b] = &found.engines[..] else { panic!("{found:?}") };
        assert!(close(a.first_with_any_weights, 2.0 / 3.0), "{a:?}");
        assert!((a.central_weights.as_ref().unwrap()[0] - 200.0 / 3.0).abs() < 1.0, "{a:?}");
        assert!((b.central_weights.as_ref().unwrap()[0] - 100.0 / 6.0).abs() < 1.0, "{b:?}");
        assert_eq!((a.confidence, b.confidence), (Some(1.0), Some(1.0)));
        // With the weights as stated B has 6.2 against 5.0.
        assert_eq!((a.ranks.clone(), b.first_as_stated), (vec![0.0, 1.0], 1.0));
        assert!((b.ahead - 1.2).abs() < 1e-9 && (a.ahead + 1.2).abs() < 1e-9);
    }

    /// One criterion that is unknown of both: each is first in half of the draws. Known of the one as 7.5: it is first in
    /// three of four.
    #[test]
    fn what_is_unknown_may_be_anything() {
        let unknown = || ScoreSource::Between(Interval { low: 0.0, high: 10.0 });
        let alternatives =
            [Alternative { engine: "a", scores: vec![unknown()] }, Alternative::certain("b", &[7.5])];
        let found = acceptability(&alternatives, &[100.0], &Rule::default());
        assert!(close(found.engines[1].ranks[0], 0.75), "{found:?}");
        let alternatives = ["a", "b"].map(|engine| Alternative { engine, scores: vec![unknown()] });
        let found = acceptability(&alternatives, &[100.0], &Rule::default());
        assert!(close(found.engines[0].ranks[0], 0.5), "{found:?}");
    }

    #[test]
    fn twins_share_their_ranks_and_each_rank_is_given_once() {
        let alternatives = [
            Alternative::certain("a", &[5.0, 5.0]),
            Alternative::certain("b", &[5.0, 5.0]),
            Alternative::certain("c", &[1.0, 9.5]),
        ];
        let found = acceptability(&alternatives, &[50.0, 50.0], &Rule::default());
        let [a, b, c] = &found.engines[..] else { panic!("{found:?}") };
        assert_eq!(a.ranks, b.ranks);
        for rank in 0..3 {
            assert!((a.ranks[rank] + b.ranks[rank] + c.ranks[rank] - 1.0).abs() < 1e-9, "{found:?}");
        }
        assert!((c.ranks.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        factor: f64,
        cases: std::collections::BTreeMap<String, Case>,
        reversal: Reversal,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        weights: Vec<f64>,
        scores: Vec<Vec<f64>>,
        totals: Vec<f64>,
        smaa: Smaa,
        break_even: BreakEvens,
    }

    #[derive(serde::Deserialize)]
    struct Smaa {
        ranks: Vec<Vec<f64>>,
        first_with_any_weights: Vec<f64>,
        central_weights: Vec<Option<Vec<f64>>>,
    }

    #[derive(serde::Deserialize)]
    struct BreakEvens {
        first: usize,
        levels: Vec<[Option<f64>; 2]>,
    }

    #[derive(serde::Deserialize)]
    struct Reversal {
        scores: Vec<Vec<f64>>,
        irrelevant: Vec<f64>,
        scaled_before: Vec<f64>,
        scaled_after: Vec<f64>,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("../../tests/decision/golden.json")).unwrap()
    }

    /// By tests/decision/make.py: pymcdm's weighted sum, and a million draws of numpy.
    #[test]
    fn other_implementations_agree() {
        let golden = golden();
        let rule = Rule { weight_factor: golden.factor, draws: 40_000, ..Rule::default() };
        for (name, case) in golden.cases {
            let found = totals(&case.scores, &case.weights);
            assert!(found.iter().zip(&case.totals).all(|(a, b)| (a - b).abs() < 1e-9), "{name}: {found:?}");
            let alternatives: Vec<Alternative> =
                case.scores.iter().map(|scores| Alternative::certain("engine", scores)).collect();
            let found = acceptability(&alternatives, &case.weights, &rule);
            for (engine, found) in found.engines.iter().enumerate() {
                let ranks = found.ranks.iter().zip(&case.smaa.ranks[engine]);
                assert!(ranks.into_iter().all(|(a, b)| close(*a, *b)), "{name}: {found:?}");
                let expected = case.smaa.first_with_any_weights[engine];
                assert!(close(found.first_with_any_weights, expected), "{name}: {found:?}");
                if let (Some(found), Some(expected)) =
                    (&found.central_weights, &case.smaa.central_weights[engine])
                {
                    let near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2.0);
                    assert!(near, "{name}: {found:?} {expected:?}");
                }
            }
            let engines: Vec<(&str, Vec<f64>)> = case.scores.iter().map(|s| ("engine", s.clone())).collect();
            let levels = crate::decide::breakeven::break_even(&engines, &case.weights, case.break_even.first);
            for (found, [below, above]) in levels.iter().zip(case.break_even.levels) {
                let near = |a: &Option<crate::decide::breakeven::Level>, b: Option<f64>| match (a, b) {
                    (Some(a), Some(b)) => (a.weight - b).abs() < 0.002,
                    (None, None) => true,
                    // At the very end of the scale a search may or may not find it.
                    (Some(level), None) => level.weight < 0.002 || level.weight > 99.998,
                    (None, Some(_)) => false,
                };
                assert!(near(&found.below, below) && near(&found.above, above), "{name}: {found:?}");
            }
        }
    }

    /// Scaling to those present turns the order of two when a third one comes that is worst in all; fixed scores do not.
    #[test]
    fn an_irrelevant_alternative_reverses_no_rank() {
        let Reversal { mut scores, irrelevant, scaled_before, scaled_after } = golden().reversal;
        assert!(scaled_before[0] > scaled_before[1] && scaled_after[0] < scaled_after[1]);
        let weights = [50.0, 50.0];
        let first = |scores: &[Vec<f64>]| {
            let alternatives: Vec<Alternative> =
                scores.iter().map(|scores| Alternative::certain("engine", scores)).collect();
            acceptability(&alternatives, &weights, &Rule::default()).engines
        };
        let before = first(&scores);
        assert_eq!(before[0].first_as_stated, 1.0);
        scores.push(irrelevant);
        let after = first(&scores);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before.first_as_stated, after.first_as_stated);
            assert!(close(before.ranks[0], after.ranks[0]));
        }
        assert_eq!(after[3].ranks, [0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_figures() {
        let alternatives = [Alternative::certain("a", &[9.0, 4.0]), Alternative::certain("b", &[3.0, 7.0])];
        let once = || acceptability(&alternatives, &[50.0, 50.0], &Rule::default());
        assert_eq!(once(), once());
    }
}
