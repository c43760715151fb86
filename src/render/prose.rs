//! The sentences of the decision. Each is built from the record; names are made safe for Markdown here.

use super::beside::beside;
use super::change::nearest_change;
use super::format::{list, markdown, percent, plain, points, significant};
use super::stock::{StockRow, TRAINING};
use crate::decide::Decision;
use crate::decide::criteria::Rule;
use crate::decide::ranking::{EngineSpeed, Excluded, Lead, Missing, Ranking, Verdict, Winner};
use crate::engines::stock_form;
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

/// A lead of fewer points of 10 is called small: a change of taste in one criterion is worth as much.
const SMALL_LEAD: f64 = 0.5;

/// First in fewer of the draws than this is as good as never.
const SELDOM: f64 = 0.01;

/// With fewer timed training steps of any engine the report gives no advice beyond the verdict.
const STEPS_FOR_ADVICE: usize = 6;

/// How it is decided, in some sentences.
pub fn rule(rule: &Rule) -> String {
    format!(
        "Each framework is represented by the best of its engines. One wins if it is first in at least {} of {} draws \
         (SMAA-2, Lahdelma and Salminen 2001); otherwise there is no clear winner. In each draw a weight, be it of a criterion or of a quantity within one, is up to {} times \
         as large or as small as stated, what was measured varies as the processes of the run did, and what was not measured may \
         be anything from 0 to 10.",
        percent(rule.acceptability),
        rule.draws,
        plain(rule.weight_factor)
    )
}

/// The decision and what speaks beside it, one paragraph each.
pub fn summary(decision: &Decision, stock: &[&StockRow]) -> Vec<String> {
    let Some(headline) = decision.headline() else {
        let why = "Every engine of this run is a software adapter, and those are in no ranking.";
        return vec![format!("**No decision.** {why}")];
    };
    let mut decided = vec![verdict(headline)];
    decided
        .extend(in_question(headline).into_iter().filter_map(|engine| as_shipped(headline, engine, stock)));
    let mut paragraphs = vec![decided.join(" "), beside(headline, decision)];
    paragraphs.extend(decision.rankings[1..].iter().map(verdict));
    paragraphs.retain(|p| !p.is_empty());
    paragraphs
}

/// The one to choose, or those between which there is no clear winner.
fn in_question(ranking: &Ranking) -> Vec<&str> {
    match &ranking.verdict {
        Verdict::NoCandidate => Vec::new(),
        Verdict::OnlyOne { engine } | Verdict::Winner { engine, .. } => vec![engine],
        Verdict::NoClearWinner { .. } => {
            let shares = ranking.by_acceptability();
            // One that is hardly ever first is out of the question, though nobody has won.
            let may_be_first =
                |e: &&String| shares.iter().all(|(engine, share)| engine != e || *share >= SELDOM);
            ranking.finalists.iter().filter(may_be_first).map(String::as_str).collect()
        }
    }
}

/// Of an engine with kernels of this project, what its framework does without them.
fn as_shipped(ranking: &Ranking, engine: &str, stock: &[&StockRow]) -> Option<String> {
    let framework = markdown(&ranking.candidate(engine)?.framework);
    stock_form(engine).filter(|form| *form != engine)?;
    let name = markdown(engine);
    let speeds = ranking.speed.as_ref()?;
    let is_its = |row: &&&StockRow| {
        let is_job = row.job == speeds.scenario && row.tuned_base != Quantization::None;
        row.engine == engine && row.figure == TRAINING && is_job
    };
    let Some(row) = stock.iter().find(is_its) else {
        return Some(format!(
            "{name} runs kernels of this project; what {framework} ships alone did not train in this job."
        ));
    };
    let own = speeds.engines.iter().find(|e| e.engine == engine)?;
    let is_faster = |e: &&EngineSpeed| {
        let times = e.real_tokens.median / own.real_tokens.median;
        times * row.ratio > 1.0 && e.engine != engine && ranking.finalists.contains(&e.engine)
    };
    let faster: Vec<String> = speeds.engines.iter().filter(is_faster).map(|e| markdown(&e.engine)).collect();
    let rank = if faster.is_empty() { String::new() } else { format!(", slower than {}", list(&faster)) };
    Some(format!(
        "{name} runs kernels of this project: what {framework} ships alone ({}) trains {} slot tokens/s against its {} in \
         {}{rank}.",
        markdown(&row.stock_engine),
        significant(row.stock.median),
        significant(row.tuned.median),
        markdown(&row.job)
    ))
}

/// What the ranking says, with what is needed to say more.
fn verdict(ranking: &Ranking) -> String {
    let model = markdown(&ranking.model);
    match &ranking.verdict {
        Verdict::NoCandidate => {
            format!("**No decision on {model}.** No engine passed the knock-outs: {}.", knocked_out(ranking))
        }
        Verdict::OnlyOne { engine } => {
            let others = match ranking.knocked_out.len() {
                0 => "There is no other engine to rank".to_owned(),
                1 => "The one other engine to rank is knocked out".to_owned(),
                n => format!("The {n} other engines to rank are knocked out"),
            };
            format!(
                "**Only {} is left to choose on {model}.** {others}: this is a choice for want of another, \
                 not the result of a comparison.",
                markdown(engine)
            )
        }
        Verdict::Winner { engine, runner_up, acceptability, ahead } => {
            let call = format!(
                "**Choose {}** (on {model}). It is first in {} of the draws of weights and measurements, and in the median \
                 draw {} points of 10 ahead of {}.",
                with_framework(ranking, engine),
                percent(*acceptability),
                points(*ahead),
                with_framework(ranking, runner_up)
            );
            match is_small(*ahead) {
                true => format!("{call} That is little: *What is gained and lost* tells what it is made of."),
                false => call,
            }
        }
        Verdict::NoClearWinner { obstacle, lead, missing } => {
            no_clear_winner(ranking, obstacle, lead, missing)
        }
    }
}

fn is_small(lead: f64) -> bool {
    lead < SMALL_LEAD
}

fn no_clear_winner(
    ranking: &Ranking,
    obstacle: &Option<String>,
    lead: &Option<Lead>,
    missing: &[Missing],
) -> String {
    let engines: Vec<String> = in_question(ranking).iter().map(|e| with_framework(ranking, e)).collect();
    let mut text = format!("**No clear winner** between {} on {}.", list(&engines), markdown(&ranking.model));
    match (obstacle, lead) {
        (Some(obstacle), _) => text += &format!(" They cannot be compared: {}.", markdown(obstacle)),
        (None, Some(lead)) => text += &format!(" {}", lead_sentence(lead)),
        (None, None) if is_tie(ranking) => text += " In every criterion that was measured they tie.",
        (None, None) => text += " In what was measured, none is ahead of all others on equal evidence.",
    }
    let shares = ranking.by_acceptability();
    if !shares.is_empty() {
        let share = |(engine, share): &(&str, f64)| format!("{} in {}", markdown(engine), percent(*share));
        let often: Vec<String> = shares.iter().filter(|(_, share)| *share >= SELDOM).map(share).collect();
        let rest = if often.len() < shares.len() { ", any other in less than 1 %" } else { "" };
        text += &format!(" First in the draws of weights and measurements: {}{rest}.", list(&often));
    }
    if let Some(engine) = undominated(ranking) {
        text += &match fewest_steps(ranking) {
            n if n < STEPS_FOR_ADVICE => format!(
                " To advise on a choice now, too few training steps were timed: {n} of one engine, and \
                 {STEPS_FOR_ADVICE} of each are needed."
            ),
            _ => format!(
                " If you must choose now, take {}: {} dominated.",
                markdown(engine),
                if ranking.candidates.len() == 2 { "the other one is" } else { "all others are" }
            ),
        };
    }
    if !missing.is_empty() {
        let names: Vec<String> = missing
            .iter()
            .map(|m| format!("{} ({} %)", lower(&m.title), plain((m.weight * 10.0).round() / 10.0)))
            .collect();
        text += &format!(" To decide, measure what is missing: {}.", list(&names));
    }
    text
}

/// `candle (as candle-cpu)`, or the engine alone where it is called like its framework.
pub fn with_framework(ranking: &Ranking, engine: &str) -> String {
    match ranking.candidate(engine).filter(|c| c.framework != engine) {
        Some(candidate) => format!("{} (as {})", markdown(&candidate.framework), markdown(engine)),
        None => markdown(engine),
    }
}

/// The engine that is left when the dominated ones are taken away.
fn undominated(ranking: &Ranking) -> Option<&str> {
    let is_dominated = |engine: &str| ranking.dominated.iter().any(|d| d.engine == engine);
    let mut left = ranking.candidates.iter().map(|c| c.engine.as_str()).filter(|e| !is_dominated(e));
    left.next().filter(|_| left.next().is_none())
}

pub fn knocked_out(ranking: &Ranking) -> String {
    let reason = |e: &Excluded| {
        let titles: Vec<String> = e.reasons.iter().map(|r| r.title.to_owned()).collect();
        format!("{} ({})", markdown(&e.engine), list(&titles))
    };
    list(&ranking.knocked_out.iter().map(reason).collect::<Vec<_>>())
}

fn lead_sentence(lead: &Lead) -> String {
    if lead.unknown_weight <= 0.0 {
        return format!(
            "With the weights as stated {} leads {} by {} points of 10; other weights near these turn that too often to call it.",
            markdown(&lead.engine),
            markdown(&lead.runner_up),
            points(lead.points)
        );
    }
    format!(
        "{} leads by {} points of 10 in what was measured; {} draws level if it is on average {} points better in \
         the {} % of the weight that is unknown.",
        markdown(&lead.engine),
        points(lead.points),
        markdown(&lead.runner_up),
        points(lead.to_overturn),
        plain(lead.unknown_weight)
    )
}

/// Whether everything that was measured of any candidate was measured of all, and came out equal.
fn is_tie(ranking: &Ranking) -> bool {
    ranking.winners.iter().all(|w| matches!(w, Winner::Tie | Winner::NotMeasured))
        && ranking.winners.contains(&Winner::Tie)
}

/// What to take where the first one turns out to be of no use.
#[derive(Debug, Serialize)]
pub struct NextBest {
    first: String,
    then: Vec<String>,
}

/// `None` without one to take, or another one after it.
pub fn next_best(decision: &Decision) -> Option<NextBest> {
    let ranking = decision.headline()?;
    let then: Vec<String> =
        ranking.after_first().into_iter().map(|engine| with_framework(ranking, engine)).collect();
    (!then.is_empty())
        .then(|| Some(NextBest { first: with_framework(ranking, ranking.first()?), then }))
        .flatten()
}

/// What follows, and what would change it.
pub fn conclusion(decision: &Decision) -> Vec<String> {
    let Some(ranking) = decision.headline() else { return Vec::new() };
    let mut sentences = Vec::new();
    sentences.push(match (&ranking.verdict, ranking.first()) {
        (Verdict::Winner { engine, runner_up, ahead, .. }, _) if is_small(*ahead) => format!(
            "Take {}, or {} where that suits you better: {} points of 10 are between them.",
            with_framework(ranking, engine),
            with_framework(ranking, runner_up),
            points(*ahead)
        ),
        (Verdict::Winner { engine, .. }, _) => {
            format!("Take {}. The evidence of this run is enough to say so.", with_framework(ranking, engine))
        }
        (Verdict::OnlyOne { engine }, _) => format!(
            "{} is what is left on this machine. Nothing was compared, so that this is no recommendation.",
            with_framework(ranking, engine)
        ),
        (Verdict::NoClearWinner { .. }, Some(engine)) => format!(
            "The evidence of this run does not settle it. {} is first most often, and to take it is no mistake that this \
             run could show.",
            with_framework(ranking, engine)
        ),
        _ => "Nothing can be recommended from this run.".to_owned(),
    });
    sentences.extend(ranking.break_even.as_ref().map(|found| nearest_change(ranking, found)));
    let elsewhere: Vec<String> =
        decision.targets.iter().filter(|t| !t.is_measured).map(|t| markdown(&t.title)).collect();
    if !elsewhere.is_empty() {
        sentences.push(format!("Not settled: {}.", elsewhere.join("; ")));
    }
    sentences
}

/// Timed training steps of the candidate with the fewest.
pub fn fewest_steps(ranking: &Ranking) -> usize {
    let of_engine = |engine: &str| {
        let speeds = ranking.speed.iter().flat_map(|s| &s.engines);
        speeds.filter(|e| e.engine == engine).map(|e| e.real_tokens.n).sum::<usize>()
    };
    ranking.candidates.iter().map(|c| of_engine(&c.engine)).min().unwrap_or(0)
}

/// A title in the middle of a sentence; `QLoRA` stays as it is.
pub fn lower(title: &str) -> String {
    let mut characters = title.chars();
    match (characters.next(), characters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(characters).collect()
        }
        _ => title.to_owned(),
    }
}
