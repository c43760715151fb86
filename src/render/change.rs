//! At which weights the decision would be another one, in words.

use super::format::points;
use super::prose::{lower, with_framework};
use crate::decide::breakeven::{BreakEven, Level};
use crate::decide::ranking::{BreakEvens, Ranking};

/// What weight of one criterion changes who is first, and what it takes for the second one to.
pub fn nearest_change(ranking: &Ranking, found: &BreakEvens) -> String {
    let first = format!(
        "By what was measured and the stated weights {} is first",
        with_framework(ranking, &found.first)
    );
    let second = with_framework(ranking, &found.second);
    let Some(change) = nearest(&found.criteria) else {
        return format!("{first}, and no weight of a single criterion changes that.");
    };
    let text = format!(
        "{first}; it would not be if {}: then {} draws level.",
        change.words(),
        with_framework(ranking, &change.level.engine)
    );
    if change.level.engine == found.second {
        return text;
    }
    match nearest(&found.against_second) {
        None => format!("{text} No weight of a single criterion does that for {second}, which comes second."),
        Some(change) => {
            format!("{text} For {second}, which comes second, it takes that {}.", change.words())
        }
    }
}

/// At which weight of a criterion, with the one that was stated.
struct Change<'a> {
    title: &'a str,
    stated: f64,
    level: &'a Level,
}

impl Change<'_> {
    fn words(&self) -> String {
        let (weight, stated) = (points(self.level.weight), points(self.stated));
        format!("{} counted {weight} % instead of {stated} %", lower(self.title))
    }
}

/// The smallest change of a weight. Where a criterion is all that counts, whoever ties in it is level.
fn nearest(criteria: &[(String, BreakEven)]) -> Option<Change<'_>> {
    let changes = criteria.iter().flat_map(|(title, found)| {
        let levels = [&found.below, &found.above].into_iter().flatten();
        levels.map(move |level| Change { title, stated: found.weight, level })
    });
    let distance = |change: &Change| (change.stated - change.level.weight).abs();
    changes.filter(|change| change.level.weight < 99.95).min_by(|a, b| distance(a).total_cmp(&distance(b)))
}
