//! The words by which people label rows, columns and lines of a scorecard.

/// Nothing stands there: empty, a dash, or a word for what is not known.
pub(super) fn is_blank(text: &str) -> bool {
    let text = text.trim().to_lowercase();
    ["", "-", "–", "—", "n/a", "na", "?", "tbd", "unknown", "…", "..."].contains(&text.as_str())
}

/// `Weight`, `Weights (%)`.
pub(super) fn is_weight(text: &str) -> bool {
    let nouns = ["weight", "weights", "weighting", "wt"];
    all_of(text, &[&nouns[..], &["in", "percent"]].concat())
        && words(text).iter().any(|w| nouns.contains(&w.as_str()))
}

/// `Total`, `Weighted score`, `Sum`; not `Total cost of ownership`.
pub(super) fn is_total(text: &str) -> bool {
    let known = [
        "total", "totals", "weighted", "sum", "score", "scores", "overall", "final", "average", "mean",
        "result", "points",
    ];
    all_of(text, &known)
}

/// Columns of numbers beside the options: `#`, `No.`, `Priority`, `Total`.
pub(super) fn is_no_option(text: &str) -> bool {
    let numbers =
        ["no", "nr", "id", "priority", "importance", "order", "max", "maximum", "min", "minimum", "scale"];
    let sums = ["total", "totals", "sum", "overall", "final", "average", "mean", "result"];
    let is_sum = is_total(text) && words(text).iter().any(|w| sums.contains(&w.as_str()));
    text.trim() == "#" || is_sum || is_rank(text) || all_of(text, &numbers)
}

pub(super) fn says_weighted(text: &str) -> bool {
    words(text).iter().any(|w| w == "weighted")
}

/// A column with weight times score: `Weighted`, `Weighted score`, `Contribution`.
pub(super) fn is_contribution(text: &str) -> bool {
    all_of(text, &["weighted", "contribution", "score", "points"])
        && words(text).iter().any(|w| w == "weighted" || w == "contribution")
}

/// `A weighted`, `Weighted (A)`: the option that is meant.
pub(super) fn contribution_of<'a>(text: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let tokens = |text: &str| -> Vec<String> {
        let split = text.split(|c: char| !c.is_alphanumeric());
        split.filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
    };
    let mut said = tokens(text);
    let before = said.len();
    said.retain(|w| w != "weighted" && w != "contribution");
    if said.len() == before {
        return None;
    }
    names.into_iter().find(|name| tokens(name) == said)
}

pub(super) fn is_rank(text: &str) -> bool {
    all_of(text, &["rank", "ranks", "ranking", "place", "position", "overall", "final"])
        && words(text).iter().any(|w| w != "overall" && w != "final")
}

pub(super) fn is_winner(text: &str) -> bool {
    let nouns =
        ["winner", "winners", "best", "leader", "decision", "recommendation", "recommended", "verdict"];
    let more = ["overall", "final", "option", "our", "the", "chosen", "selected", "choice"];
    let words = words(text);
    let noun =
        |w: &String| nouns.contains(&w.as_str()) || ["chosen", "selected", "choice"].contains(&w.as_str());
    words.iter().any(noun) && words.iter().all(|w| nouns.contains(&w.as_str()) || more.contains(&w.as_str()))
}

/// What follows the colon in `Decision: B`.
pub(super) fn stated_winner(line: &str) -> Option<&str> {
    let (label, rest) = line.split_once(':')?;
    is_winner(label).then_some(rest)
}

pub(super) fn is_mark(text: &str) -> bool {
    ["✓", "✔", "✔️", "✅", "x", "yes", "winner", "🏆", "recommended", "chosen", "selected"]
        .contains(&text.trim().to_lowercase().as_str())
}

fn words(text: &str) -> Vec<String> {
    let split = text.split(|c: char| !c.is_alphabetic());
    split.filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

fn all_of(text: &str, known: &[&str]) -> bool {
    let words = words(text);
    !words.is_empty() && words.iter().all(|w| known.contains(&w.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_told_from_names_of_criteria() {
        assert!(
            is_weight("Weight (%)")
                && is_weight("Weights")
                && !is_weight("Weighted")
                && !is_weight("Body weight")
        );
        assert!(is_total("Weighted total") && is_total("Sum") && !is_total("Total cost of ownership"));
        assert!(!is_total("100"));
        assert!(is_winner("Overall winner") && is_winner("Decision") && !is_winner("Decision making"));
        assert!(!is_winner("the option"));
        assert!(is_rank("Rank") && !is_rank("Overall"));
        assert_eq!(contribution_of("Weighted (Option A)", ["Option A", "Option B"]), Some("Option A"));
        assert_eq!(contribution_of("Option 2 weighted", ["Option 1", "Option 2"]), Some("Option 2"));
        assert_eq!(contribution_of("Option A", ["Option A"]), None);
        assert_eq!(stated_winner("Decision: B"), Some(" B"));
        assert_eq!(stated_winner("The decision of 10:30"), None);
    }
}
