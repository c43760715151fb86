//! The ranking of the engines on one model.

use super::breakeven::{BreakEven, break_even};
use super::criteria::Criteria;
use super::figures::{Footprint, InferFigures, Spread, TrainFigures};
use super::jobs::{Job, reference_jobs, reference_scenario};
use super::knockout::{KnockOut, knock_outs};
use super::score::{Interval, RESOLUTION, Score, compare, total};
use super::smaa::{Acceptability, Alternative, EngineAcceptability, acceptability};
use super::value::BEST;
use crate::measure::host::Environment;
use crate::record::{CellRecord, ModelRecord};
use crate::scenario::Scenario;
use serde::Serialize;
use std::cmp::Ordering;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ranking {
    pub model: String,
    pub parameters: u64,
    /// What passed the knock-outs, by name.
    pub candidates: Vec<Candidate>,
    /// The best candidate of each framework, by name: these are compared.
    pub finalists: Vec<String>,
    /// Of the finalists; `None` where there are fewer than two, or where they cannot be compared.
    pub acceptability: Option<Acceptability>,
    /// Of the criteria that were measured in whole of all finalists, by title, and of the one that is first by them.
    pub break_even: Option<BreakEvens>,
    pub knocked_out: Vec<Excluded>,
    pub dominated: Vec<Dominated>,
    /// In the order of the criteria.
    pub winners: Vec<Winner>,
    pub speed: Option<SpeedRatios>,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidate {
    pub engine: String,
    pub framework: String,
    /// In the order of the criteria.
    pub scores: Vec<Score>,
    pub total: Interval,
    /// The phase in which the training job that engines are compared on took the most memory, e.g. `load`.
    pub training_peak_in: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Excluded {
    pub engine: String,
    pub reasons: Vec<KnockOut>,
}

/// `engine` is nowhere better than `by`, and somewhere worse, in the measured criteria, what they are made of, and `speeds`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dominated {
    pub engine: String,
    pub by: String,
    /// Titles of the criteria in which it is worse, and names of speeds, e.g. `training speed`.
    pub worse_in: Vec<String>,
    /// What speeds of both were measured: `training`, `inference`.
    pub speeds: Vec<&'static str>,
}

/// At which weights another finalist would be first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BreakEvens {
    /// First by the criteria that were measured of all.
    pub first: String,
    /// Titles of the criteria, with their weight among those that were measured.
    pub criteria: Vec<(String, BreakEven)>,
    /// Second by these criteria.
    pub second: String,
    /// The same, if the first one and the second were alone.
    pub against_second: Vec<(String, BreakEven)>,
}

/// Which finalist is best in one criterion.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Winner {
    Engine {
        engine: String,
    },
    Tie,
    NotMeasured,
    /// Measured, but not of every engine or not alike.
    NotDecided,
    /// Fewer than two engines to compare.
    NoComparison,
}

/// Measured training speed on one job. It stands beside the scores and is no part of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpeedRatios {
    pub scenario: String,
    /// Slots of a row.
    pub sequence_length: usize,
    /// From fast to slow.
    pub engines: Vec<EngineSpeed>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineSpeed {
    pub engine: String,
    /// Tokens per second that are not padding.
    pub real_tokens: Spread,
    /// Median over the slowest engine's.
    pub times_the_slowest: f64,
    /// That the samples come from.
    pub processes: usize,
    /// Whether its cells name a handicap on this machine.
    pub has_caveats: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Verdict {
    /// No engine passed the knock-outs.
    NoCandidate,
    /// One passed: there is nothing to compare it with.
    OnlyOne { engine: String },
    /// It is first in as many of the draws as the rule asks for.
    Winner {
        engine: String,
        runner_up: String,
        /// In which share of the draws it is first, with weights around the stated ones.
        acceptability: f64,
        /// Points of 10 by which it is ahead in the middle draw.
        ahead: f64,
    },
    NoClearWinner {
        /// Why the cells cannot be compared at all.
        obstacle: Option<String>,
        lead: Option<Lead>,
        missing: Vec<Missing>,
    },
}

/// One engine is ahead of every other in the weighted sum of what was measured, on equal evidence.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lead {
    pub engine: String,
    pub runner_up: String,
    /// Of a total from 0 to 10.
    pub points: f64,
    /// Weight that was not measured, in percent.
    pub unknown_weight: f64,
    /// How many points of 10 the runner-up must be better, on average over what was not measured, to
    /// draw level.
    pub to_overturn: f64,
}

/// What must be measured to decide.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Missing {
    pub title: String,
    /// What of the criterion's weight is open, in percent of all.
    pub weight: f64,
    /// The engines of which it is missing, in whole or in part.
    pub engines: Vec<String>,
}

impl Ranking {
    /// Ranks the engines of `jobs` on `model`. Software adapters and stock forms of engines that are ranked must not
    /// be among them.
    pub fn of(jobs: &[Job], model: &ModelRecord, criteria: &Criteria) -> Self {
        let on_model: Vec<Job> = jobs.iter().filter(|j| j.model.name == model.name).cloned().collect();
        let mut engines: Vec<&str> = on_model.iter().map(|j| j.engine).collect();
        engines.sort_unstable();
        engines.dedup();

        let (mut candidates, mut knocked_out) = (Vec::new(), Vec::new());
        for engine in engines {
            let reasons = knock_outs(jobs, &model.name, engine, criteria.memory_target_bytes());
            if reasons.is_empty() {
                candidates.push(candidate(&on_model, model, engine, criteria));
            } else {
                knocked_out.push(Excluded { engine: engine.to_owned(), reasons });
            }
        }
        let obstacle = obstacle(&on_model, &candidates);
        let speed = match obstacle {
            None => speed_ratios(&on_model, model, &candidates),
            Some(_) => None,
        };
        let dominated = match obstacle {
            None => dominated(&candidates, criteria, &speeds(&on_model, model, speed.as_ref())),
            Some(_) => Vec::new(),
        };
        let finalists = finalists(&candidates, &dominated, speed.as_ref());
        let winner = |index| match winner(&finalists, index) {
            Winner::Engine { .. } | Winner::Tie if obstacle.is_some() => Winner::NotDecided,
            other => other,
        };
        let drawn =
            (obstacle.is_none() && finalists.len() > 1).then(|| acceptability_of(&finalists, criteria));
        Self {
            model: model.name.clone(),
            parameters: model.parameters,
            dominated,
            winners: (0..criteria.criteria.len()).map(winner).collect(),
            break_even: if obstacle.is_none() { break_evens(&finalists, criteria) } else { None },
            verdict: verdict(&finalists, criteria, obstacle, drawn.as_ref()),
            finalists: finalists.iter().map(|c| c.engine.clone()).collect(),
            acceptability: drawn,
            speed,
            candidates,
            knocked_out,
        }
    }

    pub fn candidate(&self, engine: &str) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.engine == engine)
    }

    /// The best of these engines that passed the knock-outs.
    pub fn best_of(&self, engines: &[&str]) -> Option<&Candidate> {
        let among = self.candidates.iter().filter(|c| engines.contains(&c.engine.as_str()));
        among.reduce(|best, c| if is_better(c, best, self.speed.as_ref()) { c } else { best })
    }

    /// What to take: the winner, or the only one, or else the finalist that is first most often.
    pub fn first(&self) -> Option<&str> {
        match &self.verdict {
            Verdict::Winner { engine, .. } | Verdict::OnlyOne { engine } => Some(engine),
            Verdict::NoCandidate => None,
            Verdict::NoClearWinner { .. } => self.by_acceptability().first().map(|(engine, _)| *engine),
        }
    }

    /// The other finalists, from the one to take next on.
    pub fn after_first(&self) -> Vec<&str> {
        let first = self.first();
        self.by_acceptability().into_iter().map(|(engine, _)| engine).filter(|e| Some(*e) != first).collect()
    }

    /// The finalists with the share of the draws in which each is first, from often to seldom.
    pub fn by_acceptability(&self) -> Vec<(&str, f64)> {
        let mut engines: Vec<_> = self.acceptability.iter().flat_map(|drawn| &drawn.engines).collect();
        engines.sort_by(|a, b| a.order(b));
        engines.into_iter().map(|e| (e.engine.as_str(), e.ranks[0])).collect()
    }
}

/// The best of each framework that none of its own dominates: by the middle of what its total may be, and of equal ones by
/// the speed of training.
fn finalists(
    candidates: &[Candidate],
    dominated: &[Dominated],
    speed: Option<&SpeedRatios>,
) -> Vec<Candidate> {
    let framework = |engine: &str| candidates.iter().find(|c| c.engine == engine).map(|c| &c.framework);
    let is_below_its_own = |c: &Candidate| {
        dominated.iter().any(|d| d.engine == c.engine && framework(&d.by) == Some(&c.framework))
    };
    let mut best: Vec<Candidate> = Vec::new();
    for candidate in candidates.iter().filter(|c| !is_below_its_own(c)) {
        match best.iter_mut().find(|known| known.framework == candidate.framework) {
            Some(known) if is_better(candidate, known, speed) => *known = candidate.clone(),
            Some(_) => {}
            None => best.push(candidate.clone()),
        }
    }
    best.sort_by(|a, b| a.engine.cmp(&b.engine));
    best
}

fn is_better(a: &Candidate, b: &Candidate, speed: Option<&SpeedRatios>) -> bool {
    let middle = |c: &Candidate| (c.total.low + c.total.high) / 2.0;
    let speed_of = |engine: &str| {
        let of_engine = speed.and_then(|s| s.engines.iter().find(|e| e.engine == engine));
        of_engine.map_or(0.0, |e| e.real_tokens.median)
    };
    let by_speed = || speed_of(&a.engine).total_cmp(&speed_of(&b.engine));
    compare(middle(a), middle(b)).then_with(by_speed) == Ordering::Greater
}

fn acceptability_of<'a>(finalists: &'a [Candidate], criteria: &'a Criteria) -> Acceptability {
    let of = |c: &'a Candidate| Alternative::new(&c.engine, &criteria.criteria, &c.scores);
    let alternatives: Vec<Alternative<'a>> = finalists.iter().map(of).collect();
    let weights: Vec<f64> = criteria.criteria.iter().map(|c| c.weight).collect();
    acceptability(&alternatives, &weights, &criteria.decision)
}

fn break_evens(finalists: &[Candidate], criteria: &Criteria) -> Option<BreakEvens> {
    let known = |index: &usize| {
        let is_known = |c: &Candidate| c.scores[*index].range().low == c.scores[*index].range().high;
        finalists.iter().all(is_known)
    };
    let measured: Vec<usize> = (0..criteria.criteria.len()).filter(known).collect();
    if finalists.len() < 2 || measured.len() < 2 {
        return None;
    }
    let sum: f64 = measured.iter().map(|i| criteria.criteria[*i].weight).sum();
    let weights: Vec<f64> = measured.iter().map(|i| 100.0 * criteria.criteria[*i].weight / sum).collect();
    let scores = |c: &Candidate| measured.iter().map(|i| c.scores[*i].range().low).collect::<Vec<f64>>();
    let mut engines: Vec<(&str, Vec<f64>)> =
        finalists.iter().map(|c| (c.engine.as_str(), scores(c))).collect();
    let total = |scores: &[f64]| -> f64 { scores.iter().zip(&weights).map(|(s, w)| s * w).sum() };
    // Stable: of equal ones the first by name stays first.
    engines.sort_by(|a, b| total(&b.1).total_cmp(&total(&a.1)));
    let titled = |engines: &[(&str, Vec<f64>)]| {
        let titles = measured.iter().map(|i| criteria.criteria[*i].title.clone());
        titles.zip(break_even(engines, &weights, 0)).collect()
    };
    Some(BreakEvens {
        first: engines[0].0.to_owned(),
        criteria: titled(&engines),
        second: engines[1].0.to_owned(),
        against_second: titled(&engines[..2]),
    })
}

fn candidate(jobs: &[Job], model: &ModelRecord, engine: &str, criteria: &Criteria) -> Candidate {
    let score = |criterion| Score::of(criterion, jobs, &model.name, engine);
    let scores: Vec<Score> = criteria.criteria.iter().map(score).collect();
    let total = total(criteria.criteria.iter().map(|c| c.weight).zip(&scores));
    let mut cells = jobs.iter().filter(|j| j.engine == engine).flat_map(|j| j.ok());
    let framework = cells.find_map(|cell| cell.framework.clone()).unwrap_or_else(|| engine.to_owned());
    let training_peak_in = training_peak_in(jobs, model, engine);
    Candidate { engine: engine.to_owned(), framework, scores, total, training_peak_in }
}

fn training_peak_in(jobs: &[Job], model: &ModelRecord, engine: &str) -> Option<String> {
    let job = reference_jobs(jobs, &model.name).into_iter().find(|j| j.engine == engine)?;
    let (_, cell) = Footprint::of_job(job).filter(|(_, cell)| !Footprint::is_of_device(cell))?;
    cell.samples.phases.iter().max_by_key(|phase| phase.peak_bytes).map(|phase| phase.name.clone())
}

fn speed_ratios(jobs: &[Job], model: &ModelRecord, candidates: &[Candidate]) -> Option<SpeedRatios> {
    let scenario = reference_scenario(jobs, &model.name, "train")?;
    let is_candidate = |engine: &str| candidates.iter().any(|c| c.engine == engine);
    let mut speeds: Vec<(&Job, Spread)> = jobs
        .iter()
        .filter(|j| j.scenario == scenario && j.is_qlora && is_candidate(j.engine))
        .filter_map(|j| Some((j, TrainFigures::of(j)?.real_tokens)))
        .collect();
    speeds.sort_by(|a, b| b.1.median.total_cmp(&a.1.median));
    let slowest = speeds.last()?.1.median;
    let engine = |(job, real_tokens): (&Job, Spread)| EngineSpeed {
        engine: job.engine.to_owned(),
        real_tokens,
        times_the_slowest: real_tokens.median / slowest,
        processes: job.ok().count(),
        has_caveats: job.ok().any(|cell| !cell.caveats.is_empty()),
    };
    let Scenario::Train(train) = speeds[0].0.parameters else { return None };
    Some(SpeedRatios {
        scenario: scenario.to_owned(),
        sequence_length: train.sequence_length,
        engines: speeds.into_iter().map(engine).collect(),
    })
}

/// A speed by which engines are held against each other.
struct Speed<'a> {
    /// `training` or `inference`.
    kind: &'static str,
    title: &'static str,
    of_engines: Vec<(&'a str, Spread)>,
}

impl Speed<'_> {
    fn of(&self, engine: &str) -> Option<Spread> {
        self.of_engines.iter().find(|(e, _)| *e == engine).map(|(_, spread)| *spread)
    }
}

/// Training speed, and both speeds of inference, on the jobs that engines are compared on.
fn speeds<'a>(jobs: &[Job<'a>], model: &ModelRecord, training: Option<&'a SpeedRatios>) -> Vec<Speed<'a>> {
    let scenario = reference_scenario(jobs, &model.name, "infer");
    let is_reference = |j: &&Job| Some(j.scenario) == scenario && j.is_qlora;
    let figures: Vec<(&str, InferFigures)> =
        jobs.iter().filter(is_reference).filter_map(|j| Some((j.engine, InferFigures::of(j)?))).collect();
    let inference = |of: fn(&InferFigures) -> Option<Spread>| {
        figures.iter().filter_map(|(engine, f)| Some((*engine, of(f)?))).collect()
    };
    let training = training.map(|s| s.engines.iter().map(|e| (e.engine.as_str(), e.real_tokens)).collect());
    vec![
        Speed { kind: "training", title: "training speed", of_engines: training.unwrap_or_default() },
        Speed { kind: "inference", title: "prefill speed", of_engines: inference(|f| f.prefill) },
        Speed { kind: "inference", title: "decoding speed", of_engines: inference(|f| f.decode) },
    ]
}

/// What makes the cells of the candidates incomparable.
fn obstacle(jobs: &[Job], candidates: &[Candidate]) -> Option<String> {
    let jobs: Vec<&Job> = jobs.iter().filter(|j| candidates.iter().any(|c| c.engine == j.engine)).collect();
    let cells = || jobs.iter().flat_map(|j| j.ok());
    let first = cells().next()?;
    let differing =
        |parts: fn(&CellRecord) -> Vec<Part>| cells().find_map(|cell| difference(parts(first), parts(cell)));
    if let Some(difference) = differing(|c| machine(&c.environment)) {
        return Some(format!("the cells come from different machines ({difference})"));
    }
    if let Some(difference) = differing(|c| build(&c.environment)) {
        return Some(format!("the cells come from different builds of evalfw ({difference})"));
    }
    if let Some(difference) = differing(definitions) {
        return Some(format!("the cells define figures in different ways ({difference})"));
    }
    if let Some(difference) = differing(|c| identity(&c.model)) {
        return Some(format!("the cells are of different models of one name ({difference})"));
    }
    for (index, job) in jobs.iter().enumerate() {
        let same_name =
            |other: &&&Job| other.scenario == job.scenario && other.quantization == job.quantization;
        if let Some(other) = jobs[..index].iter().find(|o| same_name(o) && o.parameters != job.parameters) {
            return Some(format!(
                "{} and {} ran {} with different parameters",
                other.engine, job.engine, job.scenario
            ));
        }
    }
    None
}

/// A property with its value in words.
type Part = (&'static str, String);

/// The properties that differ, e.g. `commit: abc, def`.
fn difference(a: Vec<Part>, b: Vec<Part>) -> Option<String> {
    let differing = a.into_iter().zip(b).filter(|(a, b)| a != b);
    let parts: Vec<String> = differing.map(|((name, a), (_, b))| format!("{name}: {a}, {b}")).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn machine(e: &Environment) -> Vec<Part> {
    vec![
        ("operating system", e.os.clone()),
        ("CPU", e.cpu.clone()),
        ("logical cores", e.logical_cores.to_string()),
        ("bytes of memory", e.memory_bytes.to_string()),
        ("GPUs", or_none(&e.gpus)),
    ]
}

fn build(e: &Environment) -> Vec<Part> {
    vec![
        ("version", e.evalfw_version.clone()),
        ("commit", e.commit.clone().unwrap_or_else(|| "unknown".to_owned())),
        ("features", or_none(&e.features)),
    ]
}

fn definitions(cell: &CellRecord) -> Vec<Part> {
    let measure = cell.samples.memory_measure.clone().unwrap_or_else(|| "resident".to_owned());
    vec![("schema", cell.schema.to_string()), ("memory", measure)]
}

fn identity(model: &ModelRecord) -> Vec<Part> {
    vec![
        ("parameters", model.parameters.to_string()),
        ("bytes of the checkpoint", model.checkpoint_bytes.to_string()),
        ("origin", model.origin.clone()),
    ]
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(" and ") }
}

/// Engines that another one dominates. Speeds count here, though they have no score: to be nowhere
/// better needs an order and no scale. Speeds whose samples overlap are equal.
fn dominated(candidates: &[Candidate], criteria: &Criteria, speeds: &[Speed]) -> Vec<Dominated> {
    let mut found = Vec::new();
    for engine in candidates {
        let by = candidates.iter().filter(|other| other.engine != engine.engine);
        let worse_in = |other: &Candidate| worse_in(engine, other, criteria, speeds);
        let first = by.filter_map(|other| Some((other, worse_in(other)?))).max_by_key(|(_, w)| w.len());
        if let Some((other, worse_in)) = first {
            let measured = speeds.iter().filter(|s| s.of(&engine.engine).is_some());
            let mut speeds: Vec<&str> = measured.map(|s| s.kind).collect();
            speeds.dedup();
            let (engine, by) = (engine.engine.clone(), other.engine.clone());
            found.push(Dominated { engine, by, worse_in, speeds });
        }
    }
    found
}

/// Whether `a` scores better than `b` in a quantity, though it may not in the whole criterion: there are weights of the
/// quantities with which that counts for more. Speeds have a comparison of their own.
fn is_better_in_a_part(a: &Candidate, b: &Candidate) -> bool {
    let mut pairs = a.scores.iter().zip(&b.scores).flat_map(|(a, b)| a.parts().iter().zip(b.parts()));
    pairs.any(|(a, b)| match (a.score, b.score) {
        (Some(own), Some(other)) => !a.metric.is_speed() && compare(own, other) == Ordering::Greater,
        _ => false,
    })
}

/// In what `a` is worse than `b`, if it is worse somewhere and better nowhere.
fn worse_in(a: &Candidate, b: &Candidate, criteria: &Criteria, speeds: &[Speed]) -> Option<Vec<String>> {
    if is_better_in_a_part(a, b) {
        return None;
    }
    let mut worse = Vec::new();
    for ((criterion, a), b) in criteria.criteria.iter().zip(&a.scores).zip(&b.scores) {
        if a.value().is_none() && b.value().is_none() {
            continue;
        }
        match a.compare(b)? {
            Ordering::Greater => return None,
            Ordering::Less => worse.push(criterion.title.clone()),
            Ordering::Equal => {}
        }
    }
    for speed in speeds {
        match (speed.of(&a.engine), speed.of(&b.engine)) {
            (None, None) => {}
            (Some(a), Some(b)) if a.is_clear_of(&b) => return None,
            (Some(a), Some(b)) if b.is_clear_of(&a) => worse.push(speed.title.to_owned()),
            (Some(_), Some(_)) => {}
            _ => return None,
        }
    }
    (!worse.is_empty()).then_some(worse)
}

fn winner(candidates: &[Candidate], criterion: usize) -> Winner {
    let scores: Vec<(&str, &Score)> =
        candidates.iter().map(|c| (c.engine.as_str(), &c.scores[criterion])).collect();
    if scores.iter().all(|(_, s)| s.value().is_none()) {
        return Winner::NotMeasured;
    }
    if scores.len() < 2 {
        return Winner::NoComparison;
    }
    let against_others = |engine: &str, score: &Score, wanted: Ordering| {
        scores.iter().filter(|(other, _)| *other != engine).all(|(_, s)| score.compare(s) == Some(wanted))
    };
    if let Some((engine, _)) = scores.iter().find(|(e, s)| against_others(e, s, Ordering::Greater)) {
        return Winner::Engine { engine: engine.to_string() };
    }
    // The best ones share the place: nobody is above them.
    let is_best = |score: &Score| {
        scores.iter().all(|(_, s)| matches!(score.compare(s), Some(Ordering::Greater | Ordering::Equal)))
    };
    if scores.iter().any(|(_, s)| is_best(s)) { Winner::Tie } else { Winner::NotDecided }
}

fn verdict(
    finalists: &[Candidate],
    criteria: &Criteria,
    obstacle: Option<String>,
    drawn: Option<&Acceptability>,
) -> Verdict {
    match finalists {
        [] => return Verdict::NoCandidate,
        [only] => return Verdict::OnlyOne { engine: only.engine.clone() },
        _ => {}
    }
    if let Some(winner) = drawn.and_then(|drawn| called(drawn, criteria.decision.acceptability)) {
        return winner;
    }
    let lead = if obstacle.is_none() { lead(finalists, criteria) } else { None };
    Verdict::NoClearWinner { obstacle, lead, missing: missing(finalists, criteria) }
}

/// The one that is first often enough, if its lead can be seen at all.
fn called(drawn: &Acceptability, least: f64) -> Option<Verdict> {
    let mut engines: Vec<&EngineAcceptability> = drawn.engines.iter().collect();
    engines.sort_by(|a, b| a.order(b));
    let [first, second, ..] = engines[..] else { return None };
    (first.ranks[0] >= least && first.ahead >= RESOLUTION).then(|| Verdict::Winner {
        engine: first.engine.clone(),
        runner_up: second.engine.clone(),
        acceptability: first.ranks[0],
        ahead: first.ahead,
    })
}

/// The engine that is ahead of every other in what was measured of both alike.
fn lead(candidates: &[Candidate], criteria: &Criteria) -> Option<Lead> {
    candidates.iter().find_map(|engine| {
        let others = candidates.iter().filter(|c| c.engine != engine.engine);
        let leads: Option<Vec<Lead>> = others.map(|other| lead_over(engine, other, criteria)).collect();
        leads?.into_iter().min_by(|a, b| a.points.total_cmp(&b.points))
    })
}

/// `None` if `a` is not ahead, or if it was measured in other things than `b`.
fn lead_over(a: &Candidate, b: &Candidate, criteria: &Criteria) -> Option<Lead> {
    let (mut points, mut unknown_weight) = (0.0, 0.0);
    for ((criterion, a), b) in criteria.criteria.iter().zip(&a.scores).zip(&b.scores) {
        if a.value().is_some() || b.value().is_some() {
            a.compare(b)?;
        }
        // What is missing, be it a whole criterion or an item of a checklist, is as wide on both sides.
        let (a, b) = (a.range(), b.range());
        if (a.high - a.low) != (b.high - b.low) {
            return None;
        }
        points += criterion.weight / 100.0 * (a.low - b.low);
        unknown_weight += criterion.weight * (a.high - a.low) / BEST;
    }
    let ahead = compare(points, 0.0) == Ordering::Greater;
    ahead.then(|| Lead {
        engine: a.engine.clone(),
        runner_up: b.engine.clone(),
        points,
        unknown_weight,
        to_overturn: points * 100.0 / unknown_weight,
    })
}

fn missing(candidates: &[Candidate], criteria: &Criteria) -> Vec<Missing> {
    let of_criterion = |(index, criterion): (usize, &super::criteria::Criterion)| {
        let unknown = |c: &&Candidate| c.scores[index].range().low < c.scores[index].range().high;
        let engines: Vec<String> = candidates.iter().filter(unknown).map(|c| c.engine.clone()).collect();
        let open = |c: &Candidate| (c.scores[index].range().high - c.scores[index].range().low) / BEST;
        let most = candidates.iter().map(open).fold(0.0, f64::max);
        let title = criterion.title.clone();
        (!engines.is_empty()).then_some(Missing { title, weight: criterion.weight * most, engines })
    };
    criteria.criteria.iter().enumerate().filter_map(of_criterion).collect()
}
