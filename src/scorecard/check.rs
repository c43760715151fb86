//! What a scorecard states, held against what follows from its weights and scores.

use super::balance::{BreakEven, break_even, dominator, range};
use super::number::Figure;
use super::{Claim, Finding, Kind, Level, Scale, Scorecard, Winner, names};
use serde::Serialize;

/// Two numbers closer than this are equal: what adding decimals in binary leaves.
pub(super) const EPSILON: f64 = 1e-9;

/// A figure, or what it can be where scores are missing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

impl Interval {
    pub fn is_known(self) -> bool {
        self.high - self.low <= EPSILON
    }

    fn surely_above(self, other: Self) -> bool {
        self.low > other.high + EPSILON
    }

    fn equals(self, other: Self) -> bool {
        self.is_known() && other.is_known() && (self.low - other.low).abs() <= EPSILON
    }
}

/// The card recomputed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    pub scale: Scale,
    pub weight_sum: f64,
    /// What the sum should be: 100 or 1.
    pub weight_unit: f64,
    pub criteria: Vec<CheckedCriterion>,
    pub options: Vec<CheckedOption>,
    /// Those that no other option surely beats.
    pub winners: Vec<String>,
    pub break_even: Option<Vec<BreakEven>>,
    pub findings: Vec<Finding>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckedCriterion {
    pub name: String,
    pub weight: f64,
    pub highest: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckedOption {
    pub name: String,
    /// In the order of the criteria; null where missing.
    pub scores: Vec<Option<f64>>,
    /// Σ weight · score / [`Checked::weight_unit`]; a missing score lies anywhere on the scale.
    pub total: Interval,
    pub stated_totals: Vec<f64>,
    /// Equal totals share a rank, and the next ranks are left out.
    pub rank: Interval,
    pub stated_rank: Option<f64>,
    pub dominated_by: Option<String>,
}

impl Checked {
    /// Whether there is anything to put right or to make clear.
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|f| f.level == Level::Note)
    }
}

pub fn check(card: &Scorecard) -> Checked {
    let totals: Vec<Interval> = (0..card.options.len()).map(|o| total(card, o)).collect();
    let mut findings = card.findings.clone();
    weights(card, &mut findings);
    duplicates(card, &mut findings);
    scores(card, &mut findings);
    stated_totals(card, &totals, &mut findings);
    winners(card, &totals, &mut findings);
    ranks(card, &totals, &mut findings);
    findings.sort_by_key(|f| f.line);

    let name = |o: usize| card.options[o].name.clone();
    let options = (0..card.options.len()).map(|o| CheckedOption {
        name: name(o),
        scores: card.options[o].scores.iter().map(|s| s.value).collect(),
        total: totals[o],
        stated_totals: card.options[o].totals.iter().map(|t| t.value).collect(),
        rank: rank(&totals, o),
        stated_rank: card.options[o].rank.map(|r| r.value),
        dominated_by: dominator(card, o).map(name),
    });
    let criteria = card.criteria.iter().enumerate().map(|(k, criterion)| CheckedCriterion {
        name: criterion.name.clone(),
        weight: criterion.weight,
        highest: unbeaten(&ranges(card, k)).into_iter().map(name).collect(),
    });
    Checked {
        scale: card.scale,
        weight_sum: card.weight_total(),
        weight_unit: card.unit,
        criteria: criteria.collect(),
        options: options.collect(),
        winners: unbeaten(&totals).into_iter().map(name).collect(),
        break_even: break_even(card, &totals),
        findings,
    }
}

fn total(card: &Scorecard, option: usize) -> Interval {
    let terms = card.criteria.iter().zip(&card.options[option].scores);
    let sum = |end: fn(Interval) -> f64| {
        terms.clone().map(|(c, s)| c.weight * end(range(&s.value, card.scale))).sum::<f64>() / card.unit
    };
    Interval { low: sum(|r| r.low), high: sum(|r| r.high) }
}

fn ranges(card: &Scorecard, criterion: usize) -> Vec<Interval> {
    card.options.iter().map(|o| range(&o.scores[criterion].value, card.scale)).collect()
}

fn unbeaten(ranges: &[Interval]) -> Vec<usize> {
    let beaten = |i: &usize| ranges.iter().any(|other| other.surely_above(ranges[*i]));
    (0..ranges.len()).filter(|i| !beaten(i)).collect()
}

fn weights(card: &Scorecard, findings: &mut Vec<Finding>) {
    let (sum, unit) = (card.weight_total(), card.unit);
    let line = card.criteria.first().map_or(1, |c| c.line);
    if (sum - unit).abs() > EPSILON * unit {
        let goal = if unit == 1.0 { "1" } else { "100" };
        let text = format!("the weights add up to {}, not to {goal}", number(sum));
        findings.push(Finding::new(line, Kind::WeightSum, text));
    }
    if let Some(stated) = card.weight_sum {
        let scale = if stated.of.is_some() { 100.0 / unit } else { 1.0 };
        if (stated.value - sum * scale).abs() > stated.tolerance() {
            let text = format!(
                "the sum of the weights is stated as {}, but they add up to {}",
                stated.shown(),
                number(sum * scale)
            );
            findings.push(Finding::new(stated.line, Kind::WeightSum, text));
        }
    }
}

fn duplicates(card: &Scorecard, findings: &mut Vec<Finding>) {
    let criteria = card.criteria.iter().map(|c| (c.name.as_str(), c.line)).collect::<Vec<_>>();
    let options = card.options.iter().map(|o| (o.name.as_str(), o.line)).collect::<Vec<_>>();
    for (what, entries) in [("criterion", criteria), ("option", options)] {
        for (index, (name, line)) in entries.iter().enumerate() {
            if entries[..index].iter().any(|(earlier, _)| names::normal(earlier) == names::normal(name)) {
                findings.push(Finding::new(*line, Kind::Duplicate, format!("{what} {name} is there twice")));
            }
        }
    }
}

fn scores(card: &Scorecard, findings: &mut Vec<Finding>) {
    let Scale { low, high } = card.scale;
    for option in &card.options {
        for (criterion, score) in card.criteria.iter().zip(&option.scores) {
            let place = format!("{}, {}", option.name, criterion.name);
            match score.value {
                Some(value) if !(low..=high).contains(&value) => {
                    let text =
                        format!("{place}: the score {value} is outside the scale from {low} to {high}");
                    findings.push(Finding::new(score.line, Kind::OutOfScale, text));
                }
                None if !score.unread => {
                    let text = format!("{place}: the score is missing");
                    findings.push(Finding::new(score.line, Kind::MissingScore, text));
                }
                _ => {}
            }
            if let (Some(value), Some(stated)) = (score.value, score.contribution) {
                let product = criterion.weight * value;
                // With percent, either convention: 225 points of 1000, or 2.25 of 10.
                if ![product, product / card.unit].iter().any(|p| agrees(stated, *p)) {
                    let text = format!(
                        "{place}: the contribution is stated as {}, but {} · {value} is {}",
                        stated.shown(),
                        weight(card, criterion.weight),
                        number(product / card.unit)
                    );
                    findings.push(Finding::new(stated.line, Kind::Contribution, text));
                }
            }
        }
    }
}

fn agrees(stated: Figure, value: f64) -> bool {
    (stated.value - value).abs() <= stated.tolerance()
}

fn stated_totals(card: &Scorecard, totals: &[Interval], findings: &mut Vec<Finding>) {
    for (option, total) in card.options.iter().zip(totals) {
        for stated in option.totals.iter().filter(|stated| !may_be(card, **stated, *total)) {
            let factor = stated.of.map_or(1.0, |of| of / card.scale.high);
            let scaled = Interval { low: total.low * factor, high: total.high * factor };
            let text = if total.is_known() {
                let sum = option.scores.iter().zip(&card.criteria).filter_map(|(score, criterion)| {
                    score.value.map(|value| format!("{} · {value}", weight(card, criterion.weight)))
                });
                let sum = sum.collect::<Vec<_>>().join(" + ");
                format!(
                    "{}: the total is stated as {}, but {sum} is {}",
                    option.name,
                    stated.shown(),
                    shown(scaled)
                )
            } else {
                format!(
                    "{}: the total is stated as {}, but whatever the missing scores are it is from {}",
                    option.name,
                    stated.shown(),
                    shown(scaled)
                )
            };
            findings.push(Finding::new(stated.line, Kind::Total, text));
        }
    }
}

/// Whether a stated total is right in one of the ways to write it: on the scale, out of another best one, in percent of
/// the best, or with percent not divided by 100. If the weights do not add up, which is a finding of its own, also as
/// a mean by their sum.
fn may_be(card: &Scorecard, stated: Figure, total: Interval) -> bool {
    let mut factors = vec![stated.of.map_or(1.0, |of| of / card.scale.high)];
    if stated.of.is_none() && stated.value > card.scale.high {
        factors.push(card.unit);
    }
    let by_sum = card.unit / card.weight_total();
    factors.extend(factors.clone().iter().map(|f| f * by_sum));
    let tolerance = stated.tolerance();
    factors.iter().any(|f| (total.low * f - tolerance..=total.high * f + tolerance).contains(&stated.value))
}

fn winners(card: &Scorecard, totals: &[Interval], findings: &mut Vec<Finding>) {
    for (k, criterion) in card.criteria.iter().enumerate() {
        if let Some(claim) = &criterion.winner {
            let subject = Subject {
                of: &format!("{}: ", criterion.name),
                figure: "score",
                wrong: Kind::CriterionWinner,
            };
            findings.extend(judge(card, claim, &ranges(card, k), &subject));
        }
    }
    for claim in &card.decisions {
        let subject = Subject { of: "", figure: "total", wrong: Kind::Decision };
        findings.extend(judge(card, claim, totals, &subject));
    }
}

struct Subject<'a> {
    of: &'a str,
    figure: &'a str,
    wrong: Kind,
}

/// Holds a stated winner, or several joint ones, against the figures.
fn judge(card: &Scorecard, claim: &Claim, ranges: &[Interval], subject: &Subject) -> Option<Finding> {
    let Subject { of, figure, wrong } = subject;
    let all = || 0..ranges.len();
    let name = |o: usize| &card.options[o].name;
    let finding = |kind, text| Some(Finding::new(claim.line, kind, text));
    let stated = match &claim.winner {
        Winner::Options(stated) => stated,
        Winner::Tie => {
            let best =
                all().find(|o| all().all(|other| other == *o || ranges[*o].surely_above(ranges[other])))?;
            let text = format!(
                "{of}a tie is stated, but {} has the highest {figure}, {}",
                name(best),
                shown(ranges[best])
            );
            return finding(*wrong, text);
        }
    };
    for winner in stated.iter().copied() {
        // The highest of those that are better, so that the message does not hang on the order of columns.
        let better = all().filter(|other| ranges[*other].surely_above(ranges[winner]));
        let highest = better.reduce(|a, b| if ranges[b].low > ranges[a].low + EPSILON { b } else { a });
        if let Some(better) = highest {
            let text = format!(
                "{of}{} is stated as the winner, but {} has a higher {figure}: {} against {}",
                name(winner),
                name(better),
                shown(ranges[better]),
                shown(ranges[winner])
            );
            return finding(*wrong, text);
        }
    }
    for winner in stated.iter().copied() {
        let others = || all().filter(|other| !stated.contains(other));
        if let Some(equal) = others().find(|other| ranges[*other].equals(ranges[winner])) {
            let text = format!(
                "{of}{} is stated as the winner, but {} has the same {figure}, {}",
                name(winner),
                name(equal),
                shown(ranges[equal])
            );
            return finding(Kind::TieStatedAsWin, text);
        }
        let unsure =
            all().find(|other| *other != winner && ranges[*other].high > ranges[winner].low + EPSILON);
        if let Some(rival) = unsure {
            let text = format!(
                "{of}{} is stated as the winner, but what is missing may put {} ahead: {} against {}",
                name(winner),
                name(rival),
                shown(ranges[rival]),
                shown(ranges[winner])
            );
            return finding(Kind::Undecided, text);
        }
    }
    None
}

/// The ranks that the total allows: one more than those surely ahead, up to one more than those that may be.
fn rank(totals: &[Interval], option: usize) -> Interval {
    let others = || totals.iter().enumerate().filter(|(o, _)| *o != option).map(|(_, t)| *t);
    let ahead = others().filter(|t| t.surely_above(totals[option])).count();
    let may_be = others().filter(|t| t.high > totals[option].low + EPSILON).count();
    Interval { low: 1.0 + ahead as f64, high: 1.0 + may_be as f64 }
}

/// Equal totals may share the best of their ranks (1, 1, 3), the mean of them (1.5, 1.5, 3), or be counted once
/// (1, 1, 2). The way with which most of the stated ranks agree is taken for all.
fn ranks(card: &Scorecard, totals: &[Interval], findings: &mut Vec<Finding>) {
    let ties = |o: usize| totals.iter().filter(|t| t.equals(totals[o])).count() as f64;
    let classes = |o: usize| {
        let mut above: Vec<f64> =
            totals.iter().filter(|t| t.surely_above(totals[o])).map(|t| t.low).collect();
        above.sort_by(f64::total_cmp);
        above.dedup_by(|a, b| (*a - *b).abs() <= EPSILON);
        above.len() as f64
    };
    let competition = |o: usize| rank(totals, o);
    let shifted =
        |by: f64, o: usize| Interval { low: competition(o).low + by, high: competition(o).high + by };
    let mean = |o: usize| if ties(o) > 1.0 { shifted((ties(o) - 1.0) / 2.0, o) } else { competition(o) };
    let known = totals.iter().all(|t| t.is_known());
    let once = |o: usize| Interval { low: 1.0 + classes(o), high: 1.0 + classes(o) };
    let dense = |o: usize| if known { once(o) } else { competition(o) };

    let stated = || card.options.iter().enumerate().filter_map(|(o, option)| Some((o, option.rank?)));
    let fits =
        |range: Interval, rank: Figure| (range.low - EPSILON..=range.high + EPSILON).contains(&rank.value);
    let ways: [&dyn Fn(usize) -> Interval; 3] = [&competition, &mean, &dense];
    let misfits =
        |way: &dyn Fn(usize) -> Interval| stated().filter(|(o, rank)| !fits(way(*o), *rank)).count();
    let Some(way) = ways.into_iter().min_by_key(|way| misfits(*way)) else { return };
    for (o, rank) in stated().filter(|(o, rank)| !fits(way(*o), *rank)) {
        let name = &card.options[o].name;
        let right = shown_rank(way(o));
        let total = shown(totals[o]);
        let equal = (0..totals.len()).find(|other| *other != o && totals[*other].equals(totals[o]));
        let (kind, why) = match equal {
            Some(other) => (Kind::TieStatedAsWin, format!(", which {} has too", card.options[other].name)),
            None => (Kind::Rank, String::new()),
        };
        let text = format!(
            "{name}: the rank is stated as {}, but it is {right} by the total {total}{why}",
            rank.value
        );
        findings.push(Finding::new(rank.line, kind, text));
    }
}

fn shown_rank(rank: Interval) -> String {
    if rank.is_known() { format!("{}", rank.low) } else { format!("{} to {}", rank.low, rank.high) }
}

/// `8.70`, or `6.00 to 8.50`.
pub(super) fn shown(range: Interval) -> String {
    if range.is_known() {
        number(range.low)
    } else {
        format!("{} to {}", number(range.low), number(range.high))
    }
}

/// Two decimals, or up to four where two would hide a difference.
pub(super) fn number(value: f64) -> String {
    let decimals = (2..4).find(|d| (value - rounded(value, *d)).abs() < 1e-7).unwrap_or(4);
    format!("{:.*}", decimals, rounded(value, decimals))
}

fn rounded(value: f64, decimals: usize) -> f64 {
    let power = 10f64.powi(decimals as i32);
    // Adding 0 makes a negative zero a plain one.
    (value * power).round() / power + 0.0
}

/// `25 %`, or `0.25` where the weights are shares.
pub(super) fn weight(card: &Scorecard, weight: f64) -> String {
    let plain = rounded(weight, 6);
    if card.unit == 1.0 { format!("{plain}") } else { format!("{plain} %") }
}
