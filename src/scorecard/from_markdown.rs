//! The scorecard in a Markdown document: a table with weights and scores, and the sentences that name a winner.

use super::columns::{Role, choose, role, unused};
use super::document::{self, Document, Line, Table, Text};
use super::{
    Candidate, Claim, Criterion, DEFAULT_SCALE, Finding, Kind, Scale, Score, Scorecard, claim, unit_of,
};
use super::{labels, names, number};
use anyhow::{Context, Result, bail};

pub(super) fn parse(source: &str, scale: Option<Scale>, line: Option<usize>) -> Result<Scorecard> {
    let document = document::read(source);
    let chosen = choose(&document, line)?;
    let mut card = Reading::of(&chosen)?.card(scale)?;
    let names: Vec<String> = card.options.iter().map(|o| o.name.clone()).collect();
    for (text, line) in decisions(&document, &chosen) {
        match claim(&text, line, "the decision", &names) {
            Ok(claim) => card.decisions.extend(claim),
            Err(finding) => card.findings.push(*finding),
        }
    }
    Ok(card)
}

/// The table with the roles of its columns.
struct Reading<'a> {
    table: &'a Table,
    label: usize,
    weight: usize,
    winner: Option<usize>,
    /// The column of each option, and that with its contributions.
    options: Vec<(usize, Option<usize>)>,
    names: Vec<String>,
    findings: Vec<Finding>,
}

impl<'a> Reading<'a> {
    fn of(table: &'a Table) -> Result<Self> {
        let header = &table.rows[0];
        let roles: Vec<Role> = (0..header.len()).map(|c| role(table, c)).collect();
        let all = |wanted: Role| (0..header.len()).filter(|c| roles[*c] == wanted).collect::<Vec<_>>();
        let line = table.line;
        let [weight] = all(Role::Weight)[..] else {
            bail!("line {line}: the table has several weight columns; leave one");
        };
        let label = all(Role::Text).first().copied();
        let label =
            label.with_context(|| format!("line {line}: no column holds the names of the criteria"))?;
        let winners = all(Role::Winner);
        if winners.len() > 1 {
            bail!("line {line}: the table has several winner columns; leave one");
        }
        let mut options: Vec<(usize, Option<usize>)> =
            all(Role::Option).into_iter().map(|column| (column, None)).collect();
        let names: Vec<String> = options.iter().map(|(c, _)| header[*c].text.clone()).collect();
        let mut findings = unused(table, label, &roles);
        for column in all(Role::Contribution) {
            let of = labels::contribution_of(&header[column].text, names.iter().map(String::as_str));
            let by_name = of.and_then(|name| names.iter().position(|n| n == name));
            let before = || options.iter().position(|(c, _)| c + 1 == column);
            match by_name.or_else(before).filter(|i| options[*i].1.is_none()) {
                Some(index) => options[index].1 = Some(column),
                None => findings.push(Finding::new(
                    line,
                    Kind::NotUnderstood,
                    format!(
                        "column “{}”: it is not clear whose contributions these are",
                        header[column].text
                    ),
                )),
            }
        }
        let winner = winners.first().copied();
        Ok(Self { table, label, weight, winner, options, names, findings })
    }

    fn card(mut self, scale: Option<Scale>) -> Result<Scorecard> {
        let header = &self.table.rows[0];
        let options = self.names.iter().zip(&self.options).map(|(name, (column, _))| Candidate {
            name: name.clone(),
            line: header[*column].line,
            scores: Vec::new(),
            totals: Vec::new(),
            rank: None,
        });
        let mut card = Scorecard {
            scale: DEFAULT_SCALE,
            unit: 100.0,
            weight_sum: None,
            criteria: Vec::new(),
            options: options.collect(),
            decisions: Vec::new(),
            findings: Vec::new(),
        };
        let mut out_of = Vec::new();
        let mut percent = header[self.weight].text.contains('%');
        let weighted_total = self.table.rows[1..].iter().any(|r| labels::says_weighted(&r[self.label].text));
        for row in &self.table.rows[1..] {
            let label = &row[self.label];
            if labels::is_total(&label.text) && weighted_total && !labels::says_weighted(&label.text) {
                let text = format!("row “{}”: another row has the weighted totals", label.text);
                self.findings.push(Finding::new(label.line, Kind::NotChecked, text));
            } else if labels::is_total(&label.text) {
                self.total_row(row, &mut card);
            } else if labels::is_rank(&label.text) {
                self.rank_row(row, &mut card);
            } else if labels::is_winner(&label.text) {
                self.winner_row(row, &mut card);
            } else if self.is_heading(row) {
                if !labels::is_blank(&label.text) {
                    let text = format!("row “{}” has neither a weight nor scores", label.text);
                    self.findings.push(Finding::new(label.line, Kind::NotChecked, text));
                }
            } else {
                percent |= self.criterion_row(row, &mut card, &mut out_of)?;
            }
        }
        card.unit = if percent { 100.0 } else { unit_of(card.criteria.iter().map(|c| c.weight)) };
        card.scale = scale.unwrap_or_else(|| common_scale(&out_of));
        self.convert(&mut card, &out_of);
        card.findings.append(&mut self.findings);
        Ok(card)
    }

    fn is_heading(&self, row: &[Text]) -> bool {
        let is_score = |c: usize| number::parse(&row[c].text, row[c].line).is_some();
        labels::is_blank(&row[self.weight].text) && !self.options.iter().any(|(c, _)| is_score(*c))
    }

    /// Adds the criterion; whether its weight is in percent by its own words.
    fn criterion_row(&mut self, row: &[Text], card: &mut Scorecard, out_of: &mut Vec<OutOf>) -> Result<bool> {
        let (label, weight) = (&row[self.label], &row[self.weight]);
        let read = number::parse(&weight.text, weight.line)
            .filter(|(f, c)| c.is_none() && matches!(f.of, None | Some(100.0)));
        let Some((figure, _)) = read else {
            bail!(
                "line {}: {}: “{}” is no weight, such as 25 % or 0.25",
                weight.line,
                label.text,
                weight.text
            );
        };
        for (index, (column, contribution)) in self.options.clone().into_iter().enumerate() {
            let score = self.score(&row[column], contribution.map(|c| &row[c]), index, &label.text);
            if let Some(of) = score.1 {
                out_of.push(OutOf { option: index, criterion: card.criteria.len(), of });
            }
            card.options[index].scores.push(score.0);
        }
        let winner = self.winner.and_then(|column| self.claimed(&row[column], &label.text));
        let (name, line) = (label.text.clone(), label.line);
        card.criteria.push(Criterion { name, line, weight: figure.value, winner });
        Ok(figure.of.is_some())
    }

    /// The score, and the best one that it was stated out of.
    fn score(
        &mut self,
        cell: &Text,
        beside: Option<&Text>,
        option: usize,
        criterion: &str,
    ) -> (Score, Option<f64>) {
        let line = cell.line;
        let mut score = Score { line, value: None, unread: false, contribution: None };
        let mut of = None;
        match number::parse(&cell.text, line) {
            Some((figure, contribution)) => {
                score.value = Some(figure.value);
                score.contribution = contribution;
                of = figure.of;
            }
            None if labels::is_blank(&cell.text) => {}
            None => {
                score.unread = true;
                let place = format!("{}, {criterion}: the score", self.names[option]);
                self.not_understood(cell, &place);
            }
        }
        if let Some(beside) = beside.filter(|c| !labels::is_blank(&c.text)) {
            match number::parse(&beside.text, beside.line)
                .filter(|(f, second)| f.of.is_none() && second.is_none())
            {
                Some((figure, _)) => score.contribution = Some(figure),
                None => {
                    let place = format!("{}, {criterion}: the contribution", self.names[option]);
                    self.not_understood(beside, &place);
                }
            }
        }
        (score, of)
    }

    fn total_row(&mut self, row: &[Text], card: &mut Scorecard) {
        let weight = &row[self.weight];
        if !labels::is_blank(&weight.text) {
            match number::parse(&weight.text, weight.line) {
                Some((figure, None)) => card.weight_sum = Some(figure),
                _ => self.not_understood(weight, "the sum of the weights"),
            }
        }
        for (index, (column, contribution)) in self.options.clone().into_iter().enumerate() {
            for column in [Some(column), contribution].into_iter().flatten() {
                let cell = &row[column];
                match number::parse(&cell.text, cell.line) {
                    // Below a column of its own the sum of the scores has no weights in it.
                    Some(_) if contribution.is_some() && contribution != Some(column) => {
                        let text = format!(
                            "{}: {} is the sum of scores without weights",
                            self.names[index], cell.text
                        );
                        self.findings.push(Finding::new(cell.line, Kind::NotChecked, text));
                    }
                    Some((figure, second)) => {
                        card.options[index].totals.push(figure);
                        card.options[index].totals.extend(second);
                    }
                    None if labels::is_blank(&cell.text) => {}
                    None => {
                        let place = format!("{}: the total", self.names[index]);
                        self.not_understood(cell, &place);
                    }
                }
            }
        }
        if let Some(column) = self.winner {
            let decision = self.claimed(&row[column], "the decision");
            card.decisions.extend(decision);
        }
    }

    fn rank_row(&mut self, row: &[Text], card: &mut Scorecard) {
        for (index, (column, _)) in self.options.clone().into_iter().enumerate() {
            let cell = &row[column];
            match number::rank(&cell.text, cell.line) {
                Some(rank) => card.options[index].rank = Some(rank),
                None if labels::is_blank(&cell.text) => {}
                None => {
                    let place = format!("{}: the rank", self.names[index]);
                    self.not_understood(cell, &place);
                }
            }
        }
        self.elsewhere(row);
    }

    /// Marks under the options, or a name in any cell.
    fn winner_row(&mut self, row: &[Text], card: &mut Scorecard) {
        let is_option = |c: usize| self.options.iter().position(|(column, _)| *column == c);
        let marked: Vec<usize> =
            (0..row.len()).filter(|c| labels::is_mark(&row[*c].text)).filter_map(is_option).collect();
        if let Some(first) = marked.first() {
            let line = row[self.options[*first].0].line;
            card.decisions.push(Claim { line, winner: super::Winner::Options(marked) });
            return;
        }
        let label = self.label;
        for cell in row.iter().enumerate().filter(|(c, _)| *c != label).map(|(_, cell)| cell) {
            if names::normal(&cell.text) != "no" {
                let decision = self.claimed(cell, "the decision");
                card.decisions.extend(decision);
            }
        }
    }

    /// What stands in a row beside the columns of the options.
    fn elsewhere(&mut self, row: &[Text]) {
        for column in [Some(self.weight), self.winner].into_iter().flatten() {
            let cell = &row[column];
            if !labels::is_blank(&cell.text) {
                let text = format!("row “{}”: what “{}” means there", row[self.label].text, cell.text);
                self.findings.push(Finding::new(cell.line, Kind::NotUnderstood, text));
            }
        }
    }

    fn claimed(&mut self, cell: &Text, of: &str) -> Option<Claim> {
        claim(&cell.text, cell.line, of, &self.names).unwrap_or_else(|finding| {
            self.findings.push(*finding);
            None
        })
    }

    fn not_understood(&mut self, cell: &Text, place: &str) {
        let text = format!("{place}: “{}” is no number that is understood", cell.text);
        self.findings.push(Finding::new(cell.line, Kind::NotUnderstood, text));
    }

    /// A score out of another best one than the scale's is not converted: who wrote it may mean either.
    fn convert(&mut self, card: &mut Scorecard, out_of: &[OutOf]) {
        for entry in out_of.iter().filter(|e| e.of != card.scale.high) {
            let criterion = &card.criteria[entry.criterion].name;
            let option = &mut card.options[entry.option];
            let score = &mut option.scores[entry.criterion];
            let text = format!(
                "{}, {criterion}: a score out of {} on a scale that ends at {}",
                option.name, entry.of, card.scale.high
            );
            self.findings.push(Finding::new(score.line, Kind::NotUnderstood, text));
            score.value = None;
            score.unread = true;
        }
    }
}

/// A score that was stated as `9/10`.
struct OutOf {
    option: usize,
    criterion: usize,
    of: f64,
}

/// Scores that are all out of the same best one say what the scale is.
fn common_scale(out_of: &[OutOf]) -> Scale {
    match out_of {
        [first, rest @ ..] if rest.iter().all(|e| e.of == first.of) => Scale { low: 0.0, high: first.of },
        _ => DEFAULT_SCALE,
    }
}

/// What follows `Decision:` and its like, what stands below such a heading, and rows of other tables that begin so.
fn decisions(document: &Document, chosen: &Table) -> Vec<(String, usize)> {
    let lines = &document.lines;
    let mut found: Vec<(String, usize)> = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let text = &line.text;
        let below = at > 0 && lines[at - 1].is_heading && labels::is_winner(&lines[at - 1].text.text);
        if let Some(rest) = labels::stated_winner(&text.text) {
            found.push((format!("{rest} {}", continued(&lines[at + 1..])), text.line));
        } else if below && !line.is_heading {
            found.push((format!("{} {}", text.text, continued(&lines[at + 1..])), text.line));
        }
    }
    for table in document.tables.iter().filter(|t| t.line != chosen.line) {
        for row in &table.rows {
            if let [label, value, ..] = row.as_slice()
                && labels::is_winner(&label.text)
                && !labels::is_winner(&value.text)
            {
                found.push((value.text.clone(), label.line));
            }
        }
    }
    found
}

/// The rest of the paragraph, up to a line that states something of its own.
fn continued(lines: &[Line]) -> String {
    let rest = lines.iter().take_while(|l| l.continues && labels::stated_winner(&l.text.text).is_none());
    rest.map(|l| l.text.text.as_str()).collect::<Vec<_>>().join(" ")
}
