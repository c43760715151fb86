//! A table of the Markdown, by its cells.

use pulldown_cmark::{Alignment, Event, Tag, TagEnd};

/// The events between the start and the end of a cell.
pub type Cell<'e, 'a> = &'e [Event<'a>];

pub struct Table<'e, 'a> {
    pub alignments: &'e [Alignment],
    pub head: Vec<Cell<'e, 'a>>,
    pub rows: Vec<Vec<Cell<'e, 'a>>>,
    /// The sums below the rows, which are not sorted with them.
    pub total: Option<Vec<Cell<'e, 'a>>>,
}

impl<'e, 'a> Table<'e, 'a> {
    /// Reads from the table's start to its end.
    pub fn read(alignments: &'e [Alignment], events: &'e [Event<'a>]) -> Self {
        let mut lines: Vec<Vec<Cell>> = Vec::new();
        let mut line = Vec::new();
        let mut start = 0;
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Start(Tag::TableCell) => start = at + 1,
                Event::End(TagEnd::TableCell) => line.push(&events[start..at]),
                Event::End(TagEnd::TableHead | TagEnd::TableRow) => lines.push(std::mem::take(&mut line)),
                Event::End(TagEnd::Table) => break,
                _ => {}
            }
        }
        let mut lines = lines.into_iter();
        let head = lines.next().unwrap_or_default();
        let mut rows: Vec<_> = lines.collect();
        let is_total = |row: &mut Vec<Cell>| row.first().is_some_and(|cell| text(cell) == "Total");
        let total = rows.pop_if(is_total);
        Self { alignments, head, rows, total }
    }

    /// The rows, if each tells of one cell of the record and begins with its line.
    pub fn of_cells(&self) -> &[Vec<Cell<'e, 'a>>] {
        let is_appendix = self.head.first().is_some_and(|cell| text(cell) == "Line");
        if is_appendix { &self.rows } else { &[] }
    }

    /// Some tables of facts have an empty header.
    pub fn has_head(&self) -> bool {
        self.head.iter().any(|cell| !cell.is_empty())
    }

    pub fn is_number(&self, column: usize) -> bool {
        self.alignments.get(column) == Some(&Alignment::Right)
    }
}

/// The text without markup.
pub fn text(events: &[Event]) -> String {
    let mut text = String::new();
    for event in events {
        match event {
            Event::Text(t) | Event::Code(t) => text.push_str(t),
            Event::SoftBreak | Event::HardBreak => text.push(' '),
            _ => {}
        }
    }
    text
}
