//! The scorecard as TOML.

use super::number::Figure;
use super::{Candidate, Claim, Criterion, DEFAULT_SCALE, Scale, Score, Scorecard, claim, unit_of};
use anyhow::{Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    scale: Option<[f64; 2]>,
    winner: Option<Spanned<String>>,
    weights: Figures,
    options: BTreeMap<Spanned<String>, OptionEntry>,
    #[serde(default)]
    winners: BTreeMap<Spanned<String>, Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OptionEntry {
    scores: Figures,
    total: Option<Spanned<f64>>,
    rank: Option<Spanned<f64>>,
}

type Figures = BTreeMap<Spanned<String>, Spanned<f64>>;

pub(super) fn parse(text: &str, scale: Option<Scale>) -> Result<Scorecard> {
    let file: File = toml::from_str(text)?;
    let source = Source(text);
    let mut findings = Vec::new();
    let options = in_order(file.options, |(name, _)| name.span().start);
    options
        .iter()
        .try_for_each(|(name, entry)| source.known("scores", name, &entry.scores, &file.weights))?;
    let names: Vec<String> = options.iter().map(|(name, _)| name.get_ref().clone()).collect();
    let is_unknown = |name: &&Spanned<String>| !file.weights.contains_key(name.get_ref().as_str());
    if let Some(name) = file.winners.keys().find(is_unknown) {
        bail!("line {}: winners: {} is no criterion in [weights]", source.line(name), name.get_ref());
    }
    let mut claimed = |text: &Spanned<String>, of: &str| {
        claim(text.get_ref(), source.line(text), of, &names).unwrap_or_else(|finding| {
            findings.push(*finding);
            None
        })
    };
    let decisions: Vec<Claim> = file.winner.iter().filter_map(|w| claimed(w, "the decision")).collect();
    let criteria: Vec<Criterion> = in_order(file.weights, |(name, _)| name.span().start)
        .into_iter()
        .map(|(name, weight)| Criterion {
            line: source.line(&name),
            winner: file.winners.get(name.get_ref().as_str()).and_then(|w| claimed(w, name.get_ref())),
            weight: *weight.get_ref(),
            name: name.into_inner(),
        })
        .collect();
    let candidates =
        options.into_iter().map(|(name, entry)| candidate(name, &entry, &criteria, &source)).collect();
    let stated = file.scale.map(|[low, high]| Scale::new(low, high)).transpose()?;
    Ok(Scorecard {
        scale: scale.or(stated).unwrap_or(DEFAULT_SCALE),
        unit: unit_of(criteria.iter().map(|c| c.weight)),
        weight_sum: None,
        criteria,
        options: candidates,
        decisions,
        findings,
    })
}

fn candidate(
    name: Spanned<String>,
    entry: &OptionEntry,
    criteria: &[Criterion],
    source: &Source,
) -> Candidate {
    let line = source.line(&name);
    let score = |criterion: &Criterion| {
        let found = entry.scores.get(criterion.name.as_str());
        let line = found.map_or(line, |s| source.line(s));
        Score { line, value: found.map(|s| *s.get_ref()), unread: false, contribution: None }
    };
    Candidate {
        name: name.into_inner(),
        line,
        scores: criteria.iter().map(score).collect(),
        totals: entry.total.iter().map(|t| source.figure(t)).collect(),
        rank: entry.rank.as_ref().map(|r| source.figure(r)),
    }
}

/// TOML tables have no order; a scorecard is read in that of the file.
fn in_order<K, V>(map: BTreeMap<K, V>, place: impl Fn(&(K, V)) -> usize) -> Vec<(K, V)> {
    let mut entries: Vec<(K, V)> = map.into_iter().collect();
    entries.sort_by_key(place);
    entries
}

struct Source<'a>(&'a str);

impl Source<'_> {
    fn line<T>(&self, value: &Spanned<T>) -> usize {
        let before = self.0.as_bytes().get(..value.span().start).unwrap_or_default();
        1 + before.iter().filter(|b| **b == b'\n').count()
    }

    /// The digits are those of the text: `8.60` is stated to two, though it equals 8.6.
    fn figure(&self, value: &Spanned<f64>) -> Figure {
        let written = self.0.get(value.span()).unwrap_or_default();
        let fraction = written.split_once('.').map_or("", |(_, fraction)| fraction);
        let decimals = fraction.bytes().take_while(u8::is_ascii_digit).count();
        Figure { value: *value.get_ref(), decimals, of: None, line: self.line(value) }
    }

    fn known(
        &self,
        field: &str,
        option: &Spanned<String>,
        figures: &Figures,
        weights: &Figures,
    ) -> Result<()> {
        match figures.keys().find(|name| !weights.contains_key(name.get_ref().as_str())) {
            Some(name) => bail!(
                "line {}: options.{}.{field}: {} has no weight in [weights]",
                self.line(name),
                option.get_ref(),
                name.get_ref()
            ),
            None => Ok(()),
        }
    }
}
