//! The sentences of the decision. Each is built from the record; names are made safe for Markdown here.

use super::facts::Facts;
use super::format::{gb, list, markdown, parameters, percent, plain, points, significant};
use crate::decide::Decision;
use crate::decide::criteria::Rule;
use crate::decide::metric::Metric;
use crate::decide::ranking::{Dominated, Excluded, Lead, Missing, Ranking, Verdict, Winner};

/// With fewer timed training steps of any engine the report gives no advice beyond the verdict.
const STEPS_FOR_ADVICE: usize = 6;

/// How it is decided, in some sentences.
pub fn rule(rule: &Rule) -> String {
    format!(
        "Each framework is represented by the best of its engines. One wins if it is first in at least {} of {} draws \
         (SMAA-2, Lahdelma and Salminen 2001); otherwise there is no clear winner. In each draw a weight is up to {} times as \
         large or as small as stated, what was measured varies as the processes of the run did, and what was not measured may \
         be anything from 0 to 10.",
        percent(rule.acceptability),
        rule.draws,
        plain(rule.weight_factor)
    )
}

/// The decision and what speaks beside it, one paragraph each.
pub fn summary(decision: &Decision) -> Vec<String> {
    let Some(headline) = decision.headline() else {
        let why = "Every engine of this run is a software adapter, and those are in no ranking.";
        return vec![format!("**No decision.** {why}")];
    };
    let mut paragraphs = vec![verdict(headline), beside(headline, decision)];
    paragraphs.extend(decision.rankings[1..].iter().map(verdict));
    paragraphs.retain(|p| !p.is_empty());
    paragraphs
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
        Verdict::Winner { engine, runner_up, acceptability, ahead } => format!(
            "**Choose {}** (on {model}). It is first in {} of the draws of weights and measurements, and in the middle \
             draw {} points of 10 ahead of {}.",
            with_framework(ranking, engine),
            percent(*acceptability),
            points(*ahead),
            with_framework(ranking, runner_up)
        ),
        Verdict::NoClearWinner { obstacle, lead, missing } => {
            no_clear_winner(ranking, obstacle, lead, missing)
        }
    }
}

fn no_clear_winner(
    ranking: &Ranking,
    obstacle: &Option<String>,
    lead: &Option<Lead>,
    missing: &[Missing],
) -> String {
    let engines: Vec<String> = ranking.finalists.iter().map(|e| with_framework(ranking, e)).collect();
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
        let shares: Vec<String> = shares.iter().map(share).collect();
        text += &format!(" First in the draws of weights and measurements: {}.", list(&shares));
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

fn knocked_out(ranking: &Ranking) -> String {
    let reason = |e: &Excluded| {
        let titles: Vec<String> = e.reasons.iter().map(|r| r.title.to_owned()).collect();
        format!("{} ({})", markdown(&e.engine), list(&titles))
    };
    list(&ranking.knocked_out.iter().map(reason).collect::<Vec<_>>())
}

fn lead_sentence(lead: &Lead) -> String {
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

/// Speed and memory of the candidates, and who is dominated.
fn beside(ranking: &Ranking, decision: &Decision) -> String {
    let mut sentences = Vec::new();
    if let Some(speed) = ranking.speed.as_ref().filter(|s| s.engines.len() > 1) {
        let (fastest, slowest) = (&speed.engines[0], &speed.engines[speed.engines.len() - 1]);
        sentences.push(format!(
            "{} trains {} times as fast as {} ({} against {} tokens/s in {}).",
            markdown(&fastest.engine),
            significant(fastest.times_the_slowest),
            markdown(&slowest.engine),
            significant(fastest.real_tokens.median),
            significant(slowest.real_tokens.median),
            markdown(&speed.scenario)
        ));
    }
    let peaks: Vec<String> = ranking
        .candidates
        .iter()
        .filter_map(|c| {
            let peak = c.scores.iter().find_map(|s| s.metric(Metric::PeakTrainingMemoryGb))?;
            Some(format!("{} {} GB", markdown(&c.engine), gb(peak.value * 1e9)))
        })
        .collect();
    if !peaks.is_empty() {
        let target = plain(decision.memory_target_bytes as f64 / 1e9);
        sentences.push(format!("Peak memory in training, of {target} GB: {}.", list(&peaks)));
    }
    sentences.extend(ranking.dominated.iter().map(dominated));
    if !ranking.candidates.is_empty() && !ranking.knocked_out.is_empty() {
        sentences.push(format!("Knocked out: {}.", knocked_out(ranking)));
    }
    sentences.join(" ")
}

pub fn dominated(d: &Dominated) -> String {
    let worse: Vec<String> = d.worse_in.iter().map(|w| lower(w)).collect();
    let speeds: Vec<String> = d.speeds.iter().map(|s| s.to_string()).collect();
    let and_speeds = match speeds.as_slice() {
        [] => String::new(),
        speeds => format!(" and in {} speed", list(speeds)),
    };
    format!(
        "{} is dominated by {}: it is nowhere better in the measured criteria{and_speeds}, and worse in {}.",
        markdown(&d.engine),
        markdown(&d.by),
        list(&worse)
    )
}

/// What follows, and what would change it.
pub fn conclusion(decision: &Decision) -> Vec<String> {
    let Some(ranking) = decision.headline() else { return Vec::new() };
    let mut sentences = Vec::new();
    sentences.push(match (&ranking.verdict, ranking.first()) {
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
    if let Some(found) = &ranking.break_even {
        let levels = found.criteria.iter().flat_map(|(title, found)| {
            [&found.below, &found.above].into_iter().flatten().map(move |level| (title, found.weight, level))
        });
        let nearest = levels.min_by(|a, b| (a.1 - a.2.weight).abs().total_cmp(&(b.1 - b.2.weight).abs()));
        sentences.push(match nearest {
            Some((title, stated, level)) => format!(
                "It would change if {} counted {} % instead of {} % of what was measured: then {} draws level.",
                lower(title),
                points(level.weight),
                points(stated),
                with_framework(ranking, &level.engine)
            ),
            None => "No weight of a single criterion changes who is first by what was measured.".to_owned(),
        });
    }
    let elsewhere: Vec<String> =
        decision.targets.iter().filter(|t| !t.is_measured).map(|t| markdown(&t.title)).collect();
    if !elsewhere.is_empty() {
        sentences.push(format!("Open is what holds on: {}.", elsewhere.join("; ")));
    }
    sentences
}

/// What the decision does not cover, one sentence each.
pub fn limits(decision: &Decision, facts: &Facts) -> Vec<String> {
    let ranking = decision.headline();
    let mut limits = Vec::new();
    if facts.models.iter().all(|m| m.synthetic) {
        limits.push("The weights are random: speed and memory hold, text quality was not judged.".to_owned());
    }
    if facts.ok_cells > 0 && facts.all_on_cpu() {
        limits.push(
            "Everything ran on the CPU. Nothing here says how the engines compare on a GPU.".to_owned(),
        );
    }
    if let Some(ranking) = ranking.filter(|r| r.parameters > 0 && decision.rankings.len() == 1) {
        limits.push(format!(
            "One model size was compared ({} parameters). Whether a larger one fits is open.",
            parameters(ranking.parameters)
        ));
    }
    if let Some(steps) = ranking.filter(|r| r.speed.is_some()).map(fewest_steps) {
        limits.push(format!("The training speed of each engine is a median over at least {steps} steps."));
    }
    if !decision.software_adapters.is_empty() && ranking.is_some() {
        let names: Vec<String> = decision.software_adapters.iter().map(|e| markdown(e)).collect();
        limits.push(format!("Not compared, because it ran on a software adapter: {}.", list(&names)));
    }
    if !decision.stock_forms.is_empty() {
        let names: Vec<String> = decision.stock_forms.iter().map(|e| markdown(e)).collect();
        limits.push(format!("Not ranked beside its tuned form: {}.", list(&names)));
    }
    if facts.builds.len() > 1 {
        limits.push("The cells come from different builds of evalfw.".to_owned());
    }
    if facts.builds.iter().any(|b| b.commit.as_ref().is_some_and(|c| c.ends_with("-dirty"))) {
        limits.push("The build had changes that are in no commit.".to_owned());
    }
    match facts.cells - facts.ok_cells - facts.unavailable_cells {
        0 => {}
        1 => limits.push(format!("1 of {} cells ran and did not end ok.", facts.cells)),
        n => limits.push(format!("{n} of {} cells ran and did not end ok.", facts.cells)),
    }
    limits
}

/// Timed training steps of the candidate with the fewest.
fn fewest_steps(ranking: &Ranking) -> usize {
    let of_engine = |engine: &str| {
        let speeds = ranking.speed.iter().flat_map(|s| &s.engines);
        speeds.filter(|e| e.engine == engine).map(|e| e.real_tokens.n).sum::<usize>()
    };
    ranking.candidates.iter().map(|c| of_engine(&c.engine)).min().unwrap_or(0)
}

/// A title in the middle of a sentence; `QLoRA` stays as it is.
fn lower(title: &str) -> String {
    let mut characters = title.chars();
    match (characters.next(), characters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(characters).collect()
        }
        _ => title.to_owned(),
    }
}
