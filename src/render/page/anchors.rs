//! What links within the page lead to: headings, and the rows of cells.

use super::table::{Table, text};
use pulldown_cmark::{Event, Tag};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A heading in the table of contents, with those below it.
#[derive(Debug, Serialize)]
pub struct Section {
    pub id: String,
    pub text: String,
    pub parts: Vec<Section>,
}

/// The ids of a page: none twice.
pub struct Ids(BTreeSet<String>);

impl Ids {
    /// Those of the template are taken from the start.
    pub fn new() -> Self {
        Self(["contents", "report"].map(str::to_owned).into())
    }

    /// An id that tells the heading: `The 16 GB verdict` is `the-16-gb-verdict`. Lower case, so that none is a row's.
    pub fn of_heading(&mut self, heading: &str) -> String {
        let words = heading.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        let joined = words.collect::<Vec<_>>().join("-").to_lowercase();
        let name = if joined.is_empty() { "section".to_owned() } else { joined };
        let mut id = name.clone();
        let mut number = 1;
        while !self.0.insert(id.clone()) {
            number += 1;
            id = format!("{name}-{number}");
        }
        id
    }

    /// The id of the row of the cell in a line of the record, if none has it.
    pub fn of_row(&mut self, line: &str) -> Option<String> {
        let id = row_id(line);
        self.0.insert(id.clone()).then_some(id)
    }
}

pub fn row_id(line: &str) -> String {
    format!("L{line}")
}

/// The name of the cell by the link to its line in the record, of those that have a row in the appendix.
pub fn cells(events: &[Event]) -> BTreeMap<String, String> {
    let mut cells = BTreeMap::new();
    for (at, event) in events.iter().enumerate() {
        let Event::Start(Tag::Table(alignments)) = event else { continue };
        for row in Table::read(alignments, &events[at..]).of_cells() {
            if let (Some(link), Some(name)) = (row.first().and_then(|cell| line_link(cell)), row.get(1)) {
                cells.entry(link.to_owned()).or_insert_with(|| text(name));
            }
        }
    }
    cells
}

/// The target, if there is nothing but one link to a line in these events.
pub fn line_link<'e>(events: &'e [Event]) -> Option<&'e str> {
    match events {
        [Event::Start(Tag::Link { dest_url, .. }), Event::Text(_), Event::End(_)] => {
            record_line(dest_url).map(|_| dest_url.as_ref())
        }
        _ => None,
    }
}

/// The record and the line that a link tells: `../run/cells.jsonl#L41` is line `41` of `cells.jsonl`.
pub fn record_line(link: &str) -> Option<(&str, &str)> {
    let (path, line) = link.split_once("#L")?;
    let is_line = !line.is_empty() && line.bytes().all(|b| b.is_ascii_digit());
    let name = path.rsplit('/').next().filter(|name| !name.is_empty())?;
    is_line.then_some((name, line))
}
