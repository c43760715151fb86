//! A checked scorecard in the terminal.

use super::check::shown;
use super::{BreakEven, Checked, CheckedOption, Interval, Turn};
use crate::render::format::{harmless, list, plain};
use crate::render::terminal;

/// The matrix, the findings with their lines in `file`, and how firm the outcome is.
pub fn text(checked: &Checked, file: &str) -> String {
    let mut parts = vec![matrix(checked), findings(checked, file)];
    let dominated = checked.options.iter().filter_map(|option| {
        let by = option.dominated_by.as_ref()?;
        Some(format!("{} is dominated by {by}: no weights could make it win.\n", harmless(&option.name)))
    });
    parts.push(dominated.collect());
    parts.push(match &checked.break_even {
        Some(turns) => break_even(turns, &checked.winners),
        None => no_break_even(checked),
    });
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

fn matrix(checked: &Checked) -> String {
    let options = &checked.options;
    let mut header = vec!["criterion".to_owned(), "weight".to_owned()];
    header.extend(options.iter().map(|o| harmless(&o.name)));
    header.push("highest".to_owned());
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (k, criterion) in checked.criteria.iter().enumerate() {
        let mut row = vec![harmless(&criterion.name), weight(checked, criterion.weight)];
        row.extend(options.iter().map(|o| o.scores[k].map_or("?".to_owned(), |s| s.to_string())));
        row.push(names(&criterion.highest));
        rows.push(row);
    }
    let line = |label: &str, weight: String, of: &dyn Fn(&CheckedOption) -> String, last: String| {
        let mut row = vec![label.to_owned(), weight];
        row.extend(options.iter().map(of));
        row.push(last);
        row
    };
    let sum = weight(checked, checked.weight_sum);
    rows.push(line("total, recomputed", sum, &|o| shown(o.total), names(&checked.winners)));
    if options.iter().any(|o| !o.stated_totals.is_empty()) {
        let stated =
            |o: &CheckedOption| o.stated_totals.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
        rows.push(line("total, as stated", String::new(), &stated, String::new()));
    }
    rows.push(line("rank", String::new(), &|o| rank(o.rank), String::new()));
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    terminal::table(&header, 1..header.len() - 1, rows) + "\n"
}

fn findings(checked: &Checked, file: &str) -> String {
    if checked.findings.is_empty() {
        return "Nothing is wrong.\n".to_owned();
    }
    let line = |f: &super::Finding| format!("{file}:{}: {}: {}\n", f.line, f.level.name(), harmless(&f.text));
    let mut text: String = checked.findings.iter().map(line).collect();
    if checked.is_clean() {
        text += "Nothing is wrong in what was checked.\n";
    }
    text
}

fn break_even(turns: &[BreakEven], winners: &[String]) -> String {
    let turn = |turn: &Option<Turn>, word: &str| {
        turn.as_ref().map_or("-".to_owned(), |t| {
            format!("{word} {} %: {}", plain(t.weight * 100.0), names(&t.winners))
        })
    };
    let rows = turns.iter().map(|t| {
        let weight = format!("{} %", plain(t.weight * 100.0));
        [harmless(&t.criterion), weight, turn(&t.below, "below"), turn(&t.above, "above")]
    });
    let table = terminal::table(&["criterion", "weight", "winner changes", "or"], 1..2, rows);
    format!("{} wins until a weight passes these, the others in proportion:\n{table}\n", names(winners))
}

fn no_break_even(checked: &Checked) -> String {
    let missing = checked.options.iter().any(|o| !o.total.is_known() || o.scores.contains(&None));
    let why = if missing { "scores are missing" } else { "the highest totals are equal" };
    format!("No weight is given at which the winner would change: {why}.\n")
}

fn weight(checked: &Checked, weight: f64) -> String {
    if checked.weight_unit == 1.0 { plain(weight) } else { format!("{} %", plain(weight)) }
}

fn rank(rank: Interval) -> String {
    if rank.is_known() { rank.low.to_string() } else { format!("{}–{}", rank.low, rank.high) }
}

fn names(names: &[String]) -> String {
    list(&names.iter().map(|name| harmless(name)).collect::<Vec<_>>())
}
