//! The tables and the sentences of a Markdown document, as plain text with lines.

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Text {
    pub line: usize,
    pub text: String,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Table {
    pub line: usize,
    /// The header first. All rows are as long as the header.
    pub rows: Vec<Vec<Text>>,
    /// Rows that have more cells in the source than there are columns: Markdown drops them.
    pub too_long: Vec<(usize, usize)>,
}

#[derive(Debug, Default, PartialEq)]
pub(super) struct Document {
    pub tables: Vec<Table>,
    /// The lines of paragraphs, headings and list items.
    pub lines: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub text: Text,
    pub is_heading: bool,
    /// Goes on from the line before it.
    pub continues: bool,
}

pub(super) fn read(source: &str) -> Document {
    let mut reader = Reader { source, starts: line_starts(source), ..Reader::default() };
    for (event, range) in Parser::new_ext(source, Options::ENABLE_TABLES).into_offset_iter() {
        reader.take(event, range);
    }
    reader.flush();
    reader.document
}

#[derive(Default)]
struct Reader<'a> {
    source: &'a str,
    starts: Vec<usize>,
    document: Document,
    table: Option<Table>,
    /// What is being put together: a cell, or a line of text.
    current: Option<Text>,
    in_heading: bool,
    continues: bool,
    in_code_block: bool,
}

impl Reader<'_> {
    fn take(&mut self, event: Event, range: std::ops::Range<usize>) {
        let line = self.line(range.start);
        match event {
            Event::Start(Tag::Table(_)) => {
                self.flush();
                self.table = Some(Table { line, ..Table::default() });
            }
            Event::Start(Tag::TableHead | Tag::TableRow) => self.begin_row(line, range),
            Event::Start(Tag::TableCell) => self.current = Some(Text { line, text: String::new() }),
            Event::End(TagEnd::TableCell) => self.end_cell(),
            Event::End(TagEnd::Table) => self.end_table(),
            Event::Start(Tag::Heading { .. }) => {
                self.flush();
                self.in_heading = true;
            }
            Event::End(TagEnd::Heading(_)) => {
                self.flush();
                self.in_heading = false;
            }
            Event::Start(Tag::CodeBlock(_)) => {
                self.flush();
                self.in_code_block = true;
            }
            Event::End(TagEnd::CodeBlock) => self.in_code_block = false,
            Event::Start(Tag::Paragraph | Tag::Item | Tag::BlockQuote(_)) => self.flush(),
            Event::End(TagEnd::Paragraph | TagEnd::Item | TagEnd::BlockQuote(_)) => self.flush(),
            Event::Text(text) | Event::Code(text) if !self.in_code_block => self.push(&text, line),
            Event::InlineHtml(html) => self.push_html(&html, line),
            Event::SoftBreak | Event::HardBreak => self.end_line(),
            _ => {}
        }
    }

    fn begin_row(&mut self, line: usize, range: std::ops::Range<usize>) {
        let cells = cells(self.source.get(range).unwrap_or_default());
        if let Some(table) = &mut self.table {
            if table.rows.first().is_some_and(|header| cells > header.len()) {
                table.too_long.push((line, cells));
            }
            table.rows.push(Vec::new());
        }
    }

    fn end_table(&mut self) {
        let Some(mut table) = self.table.take() else { return };
        let columns = table.rows.first().map_or(0, Vec::len);
        for row in &mut table.rows {
            let line = row.first().map_or(table.line, |cell| cell.line);
            row.resize(columns, Text { line, text: String::new() });
        }
        self.document.tables.push(table);
    }

    fn end_cell(&mut self) {
        let Some(mut cell) = self.current.take() else { return };
        cell.text = cell.text.trim().to_owned();
        if let Some(row) = self.table.as_mut().and_then(|t| t.rows.last_mut()) {
            row.push(cell);
        }
    }

    fn push(&mut self, text: &str, line: usize) {
        self.current.get_or_insert_with(|| Text { line, text: String::new() }).text += text;
    }

    /// A line break in a cell is a space. Comments are for nobody; any other tag stays, so that what it does to the
    /// text is not guessed.
    fn push_html(&mut self, html: &str, line: usize) {
        let tag: String = html.chars().filter(|c| c.is_alphabetic()).collect::<String>().to_lowercase();
        if tag == "br" {
            self.push(" ", line);
        } else if !html.starts_with("<!--") && !["b", "strong", "em", "i"].contains(&tag.as_str()) {
            self.push(html, line);
        }
    }

    fn end_line(&mut self) {
        if self.table.is_some() {
            return;
        }
        self.flush();
        self.continues = true;
    }

    fn flush(&mut self) {
        if self.table.is_some() {
            return;
        }
        if let Some(text) = self.current.take() {
            let (is_heading, continues) = (self.in_heading, self.continues);
            self.document.lines.push(Line { text, is_heading, continues });
        }
        self.continues = false;
    }

    /// From 1.
    fn line(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }
}

fn line_starts(source: &str) -> Vec<usize> {
    let after = source.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(after).collect()
}

/// How many cells a row has in the source: an escaped pipe is none.
fn cells(row: &str) -> usize {
    let row = row.trim().trim_start_matches('|');
    let row = row.strip_suffix('|').filter(|r| !r.ends_with('\\')).unwrap_or(row);
    let mut escaped = false;
    let mut count = 1;
    for c in row.chars() {
        match c {
            '|' if !escaped => count += 1,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_sentences_have_their_lines() {
        let document =
            read("# T\n\n**Decision:**\nB\n\n| a | **b** |\n|--|--|\n| `1` \\| 2 | 3<br>4 | 5 |\n\n- x\n");
        let lines: Vec<_> =
            document.lines.iter().map(|l| (l.text.line, l.text.text.as_str(), l.continues)).collect();
        assert_eq!(lines, [(1, "T", false), (3, "Decision:", false), (4, "B", true), (10, "x", false)]);
        assert!(document.lines[0].is_heading && !document.lines[1].is_heading);
        let [table] = document.tables.as_slice() else { panic!("{document:?}") };
        let texts: Vec<Vec<&str>> =
            table.rows.iter().map(|r| r.iter().map(|c| c.text.as_str()).collect()).collect();
        assert_eq!(texts, [vec!["a", "b"], vec!["1 | 2", "3 4"]]);
        assert_eq!((table.line, table.rows[1][0].line), (6, 8));
        assert_eq!(table.too_long, [(8, 3)]);
    }
}
