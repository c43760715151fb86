//! Which option a text names as the winner.

use super::Winner;

#[derive(Debug, PartialEq)]
pub(super) enum Read {
    /// Nothing is stated.
    Nothing,
    Winner(Winner),
    Unclear,
}

/// Words after which a sentence no longer says what was chosen.
const TURNS: [&str; 12] = [
    "over", "because", "since", "rather", "instead", "not", "despite", "although", "while", "unless", "if",
    "than",
];
/// So do these once an option is named: `go with B for now`.
const LATER_TURNS: [&str; 5] = ["as", "with", "for", "but", "due"];
const TIES: [&str; 5] = ["tie", "tied", "draw", "equal", "both"];

/// The names before the sentence turns: `B, because A …` names B alone. Several are joint winners if nothing but
/// commas, slashes and `and` stands between them.
pub(super) fn winner(text: &str, options: &[String]) -> Read {
    let text = text.trim();
    if super::labels::is_blank(text) {
        return Read::Nothing;
    }
    if let Some(index) = options.iter().position(|o| normal(o) == normal(text)) {
        return Read::Winner(Winner::Options(vec![index]));
    }
    let found = mentions(text, options);
    let head_end = head(text, &found);
    let head: Vec<&Mention> = found.iter().filter(|m| m.start < head_end).collect();
    let bare = normal(text.trim_end_matches('.'));
    match head.as_slice() {
        [] if found.is_empty() && TIES.contains(&bare.as_str()) => Read::Winner(Winner::Tie),
        [] => Read::Unclear,
        [first, rest @ ..] => {
            let mut end = first.end;
            for mention in rest {
                if !joins(&text[end..mention.start]) {
                    return Read::Unclear;
                }
                end = mention.end;
            }
            let mut indices: Vec<usize> = head.iter().map(|m| m.option).collect();
            indices.sort_unstable();
            indices.dedup();
            Read::Winner(Winner::Options(indices))
        }
    }
}

/// Lower case, single spaces.
pub(super) fn normal(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

struct Mention {
    start: usize,
    end: usize,
    option: usize,
}

/// Where options are named as whole words, in the order of the text; a longer name wins over one within it. A name in
/// another case counts only where none is written exactly: `a` is not option A.
fn mentions(text: &str, options: &[String]) -> Vec<Mention> {
    let exact = mentions_in(text, options, |o| o.to_owned());
    // Lower case may have other lengths outside ASCII, and then the places would not be those of the text.
    if exact.is_empty() && text.is_ascii() {
        return mentions_in(&text.to_lowercase(), options, |o| {
            if o.len() > 1 { o.to_lowercase() } else { o.to_owned() }
        });
    }
    exact
}

fn mentions_in(text: &str, options: &[String], form: impl Fn(&str) -> String) -> Vec<Mention> {
    let mut by_length: Vec<usize> = (0..options.len()).collect();
    by_length.sort_by_key(|i| std::cmp::Reverse(options[*i].len()));
    let mut found: Vec<Mention> = Vec::new();
    for option in by_length {
        let name = form(options[option].trim());
        if name.is_empty() {
            continue;
        }
        for (start, _) in text.match_indices(&name) {
            let end = start + name.len();
            let taken = found.iter().any(|m| start < m.end && m.start < end);
            if !taken && is_word(text, start, end) {
                found.push(Mention { start, end, option });
            }
        }
    }
    found.sort_by_key(|m| m.start);
    found
}

/// `candle` is no word of its own in `candle-cpu`.
fn is_word(text: &str, start: usize, end: usize) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let mut after = text[end..].chars();
    let joined = match after.next() {
        Some('-' | '.') => after.next().is_some_and(part),
        Some(c) => part(c),
        None => false,
    };
    let before = text[..start].chars().next_back().is_some_and(|c| part(c) || c == '-');
    !before && !joined
}

/// Where the part of the text ends that says what was chosen.
fn head(text: &str, found: &[Mention]) -> usize {
    let inside = |at: usize| found.iter().any(|m| m.start <= at && at < m.end);
    let joined = |at: usize| {
        let next = found.iter().find(|m| m.start > at);
        let before = found.iter().rev().find(|m| m.end <= at);
        matches!((before, next), (Some(b), Some(n)) if joins(&text[b.end..n.start]))
    };
    let mark = text
        .char_indices()
        .filter(|(at, c)| match c {
            '.' => text[at + 1..].chars().next().is_none_or(char::is_whitespace),
            ',' => !joined(*at),
            c => ";:(—–!?".contains(*c),
        })
        .map(|(at, _)| at)
        .find(|at| !inside(*at));
    let named = found.first().map_or(usize::MAX, |m| m.start);
    let turns = |at: usize, word: &str| TURNS.contains(&word) || (at > named && LATER_TURNS.contains(&word));
    let turn = words(text).into_iter().find(|(at, word)| turns(*at, &word.to_lowercase()) && !inside(*at));
    let end = text.len();
    mark.unwrap_or(end).min(turn.map_or(end, |(at, _)| at))
}

/// Each word with its place.
fn words(text: &str) -> Vec<(usize, &str)> {
    let (mut found, mut start) = (Vec::new(), None);
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        match (c.is_alphanumeric() || c == '\'', start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                found.push((from, &text[from..at]));
                start = None;
            }
            _ => {}
        }
    }
    found
}

fn joins(between: &str) -> bool {
    let between = between.replace(['*', '_', '`'], " ");
    matches!(normal(&between).as_str(), "," | "/" | "and" | "&" | "+" | ", and" | "=")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Read {
        let options = ["A", "B", "candle", "candle-cpu", "Option 1.5"].map(str::to_owned);
        winner(text, &options)
    }

    fn one(index: usize) -> Read {
        Read::Winner(Winner::Options(vec![index]))
    }

    #[test]
    fn a_sentence_names_the_option_before_it_turns() {
        assert_eq!(read("B"), one(1));
        assert_eq!(read("we take B, because A is slow"), one(1));
        assert_eq!(read("B over A"), one(1));
        assert_eq!(read("use candle-cpu."), one(3));
        assert_eq!(read("we go with Candle for a while"), one(2));
        assert_eq!(read("Option 1.5 (8.6)"), one(4));
    }

    #[test]
    fn what_does_not_name_one_is_unclear() {
        for text in [
            "not B",
            "do not use B",
            "none",
            "A or B",
            "first A then B",
            "something else",
            "candle-gpu",
            "because A is slow, B",
        ] {
            assert_eq!(read(text), Read::Unclear, "{text}");
        }
    }

    #[test]
    fn joint_winners_and_ties() {
        let both = Read::Winner(Winner::Options(vec![0, 1]));
        for text in ["A, B", "A / B", "A and B", "B & A", "A and B, because"] {
            assert_eq!(read(text), both, "{text}");
        }
        assert_eq!(read("Tie"), Read::Winner(Winner::Tie));
        for text in ["", "-", "–", "n/a"] {
            assert_eq!(read(text), Read::Nothing, "{text}");
        }
    }
}
