//! Which table of a document is the scorecard, and what its columns hold.

use super::document::{Document, Table, Text};
use super::{Finding, Kind, labels, number};
use anyhow::{Context, Result, bail};

/// The only table that has a weight for each criterion and scores, criteria as rows.
pub(super) fn choose(document: &Document, line: Option<usize>) -> Result<Table> {
    let candidates: Vec<Table> = document
        .tables
        .iter()
        .filter_map(|t| [t.clone(), transposed(t)].into_iter().find(is_scorecard))
        .collect();
    let lines = || candidates.iter().map(|t| t.line.to_string()).collect::<Vec<_>>().join(", ");
    match (candidates.as_slice(), line) {
        ([], _) => bail!(
            "no table with a weight column (or a weight row) and columns of scores was found in {} tables",
            document.tables.len()
        ),
        ([only], None) => Ok(only.clone()),
        (_, None) => bail!(
            "several tables have weights and scores: choose by --table with its line, one of {}",
            lines()
        ),
        (_, Some(line)) => {
            let found = candidates.iter().find(|t| t.line == line);
            found.cloned().with_context(|| format!("--table {line}: such tables begin in lines {}", lines()))
        }
    }
}

fn is_scorecard(table: &Table) -> bool {
    let Some(header) = table.rows.first() else { return false };
    let weights = header.iter().filter(|c| labels::is_weight(&c.text)).count();
    weights > 0 && (0..header.len()).any(|c| matches!(role(table, c), Role::Option))
}

fn transposed(table: &Table) -> Table {
    let columns = table.rows.first().map_or(0, Vec::len);
    let cell = |row: &Vec<Text>, c: usize| row.get(c).cloned().unwrap_or_default();
    let rows = (0..columns).map(|c| table.rows.iter().map(|row| cell(row, c)).collect()).collect();
    Table { rows, ..table.clone() }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Role {
    Weight,
    Winner,
    Contribution,
    Option,
    Text,
    /// Numbers that are no scores of an option, by the header.
    Number,
}

/// What a column holds: by its header, else by what most of its cells are.
pub(super) fn role(table: &Table, column: usize) -> Role {
    let header = &table.rows[0][column].text;
    if labels::is_weight(header) {
        return Role::Weight;
    }
    if labels::is_winner(header) {
        return Role::Winner;
    }
    let others =
        table.rows[0].iter().enumerate().filter(|(c, _)| *c != column).map(|(_, cell)| cell.text.as_str());
    if labels::is_contribution(header) || labels::contribution_of(header, others).is_some() {
        return Role::Contribution;
    }
    let body =
        || table.rows[1..].iter().filter_map(|row| row.get(column)).filter(|c| !labels::is_blank(&c.text));
    let numbers = body().filter(|c| number::parse(&c.text, c.line).is_some()).count();
    let empty = body().count() == 0;
    let is_number = numbers > 0 && 2 * numbers >= body().count();
    if is_number && (labels::is_blank(header) || labels::is_no_option(header)) {
        return Role::Number;
    }
    // An option of which nothing is known yet is one all the same.
    if is_number || (empty && !labels::is_blank(header)) { Role::Option } else { Role::Text }
}

/// Columns and cells that nothing is read from.
pub(super) fn unused(table: &Table, label: usize, roles: &[Role]) -> Vec<Finding> {
    let header = &table.rows[0];
    let read = |c: usize| c == label || !matches!(roles[c], Role::Text | Role::Number);
    let numbers = |c: usize| {
        let cells = table.rows[1..].iter().map(|row| &row[c]);
        cells.filter(|cell| number::parse(&cell.text, cell.line).is_some()).count()
    };
    let finding = |c: usize| {
        let (name, line) = (&header[c].text, header[c].line);
        match (roles[c], numbers(c)) {
            (Role::Number, _) if labels::is_blank(name) => {
                Finding::new(line, Kind::NotUnderstood, format!("column {}: numbers without a header", c + 1))
            }
            (Role::Number, _) => {
                Finding::new(line, Kind::NotChecked, format!("column “{name}” is taken for no option"))
            }
            (_, 0) => Finding::new(line, Kind::NotChecked, format!("column “{name}” holds text")),
            (_, numbers) => {
                let text = format!("column “{name}”: {numbers} of its cells are numbers, the others are not");
                Finding::new(line, Kind::NotUnderstood, text)
            }
        }
    };
    // A column in which nothing stands at all is left out.
    let stands = |c: usize| table.rows.iter().any(|row| !labels::is_blank(&row[c].text));
    let mut findings: Vec<Finding> =
        (0..header.len()).filter(|c| !read(*c) && stands(*c)).map(finding).collect();
    findings.extend(table.too_long.iter().map(|(line, cells)| {
        let text = format!("the row has {cells} cells, the table has fewer columns");
        Finding::new(*line, Kind::NotUnderstood, text)
    }));
    findings
}
