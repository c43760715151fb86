//! The Markdown as HTML.

use super::anchors::{Ids, Section, cells, line_link, record_line};
use super::table::{Table, text};
use super::{Charts, escape, links};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pulldown_cmark::html::push_html;
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Characters that a cell of a table has on one line: names of engines and jobs are shorter.
const LONG: usize = 32;

pub struct Body {
    /// The text of the first heading.
    pub title: String,
    pub contents: Vec<Section>,
    pub html: String,
}

impl Body {
    pub fn of(markdown: &str, charts: &Charts) -> Self {
        let events: Vec<Event> = Parser::new_ext(markdown, Options::ENABLE_TABLES).collect();
        let mut writer = Writer {
            charts,
            cells: cells(&events),
            ids: Ids::new(),
            title: None,
            contents: Vec::new(),
            heading: String::new(),
            tables: 0,
            figures: 0,
        };
        let html = writer.html(&events);
        Self { title: writer.title.unwrap_or_default(), contents: writer.contents, html }
    }
}

struct Writer<'c> {
    charts: &'c Charts,
    /// Those that have a row on the page, by the link to their line in the record.
    cells: BTreeMap<String, String>,
    ids: Ids,
    title: Option<String>,
    contents: Vec<Section>,
    /// The last heading: what a table or a picture belongs to.
    heading: String,
    tables: usize,
    figures: usize,
}

impl Writer<'_> {
    fn html(&mut self, events: &[Event]) -> String {
        let mut html = String::new();
        push_html(&mut html, self.rewrite(events).into_iter());
        html
    }

    /// What this page writes in its own way becomes HTML; all else stays as it is.
    fn rewrite<'a>(&mut self, events: &[Event<'a>]) -> Vec<Event<'a>> {
        let mut rewritten = Vec::with_capacity(events.len());
        let mut at = 0;
        while let Some(event) = events.get(at) {
            let next = after(events, at);
            // What stands between the start and the end of an element.
            let inner = events.get(at + 1..next.saturating_sub(1)).unwrap_or_default();
            let (new, is_whole) = match event {
                Event::Start(Tag::Heading { level, .. }) => (html(self.heading(*level, inner)), true),
                Event::Start(Tag::Table(alignments)) => {
                    (html(self.table(&Table::read(alignments, &events[at..next]))), true)
                }
                Event::Start(Tag::CodeBlock(_)) => {
                    let code = escape(&text(inner));
                    (html(format!("<pre tabindex=\"0\"><code>{code}</code></pre>\n")), true)
                }
                Event::Start(Tag::Paragraph) if is_picture(inner) => (html(self.figure(inner)), true),
                Event::Start(Tag::Image { dest_url, .. }) => {
                    (html(self.picture(dest_url, &text(inner))), true)
                }
                Event::Start(Tag::Link { dest_url, .. }) => {
                    (html(links::start_tag(dest_url, &self.cells)), false)
                }
                Event::End(TagEnd::Link) => (html("</a>".to_owned()), false),
                // Raw HTML is text but for the line break in cells of a table.
                Event::Start(Tag::HtmlBlock) => (Event::Start(Tag::Paragraph), false),
                Event::End(TagEnd::HtmlBlock) => (Event::End(TagEnd::Paragraph), false),
                Event::InlineHtml(raw) if raw.as_ref() == "<br>" => (event.clone(), false),
                Event::Html(raw) | Event::InlineHtml(raw) => (Event::Text(raw.clone()), false),
                other => (other.clone(), false),
            };
            rewritten.push(new);
            at = if is_whole { next } else { at + 1 };
        }
        rewritten
    }

    fn heading(&mut self, level: HeadingLevel, inner: &[Event]) -> String {
        let text = text(inner);
        let id = self.ids.of_heading(&text);
        let html = format!("<{level} id=\"{}\">{}</{level}>\n", escape(&id), self.html(inner));
        self.heading.clone_from(&text);
        let section = Section { id, text, parts: Vec::new() };
        match (level, self.contents.last_mut()) {
            (HeadingLevel::H1, _) if self.title.is_none() => self.title = Some(section.text),
            (HeadingLevel::H1 | HeadingLevel::H2, _) | (_, None) => self.contents.push(section),
            (_, Some(above)) => above.parts.push(section),
        }
        html
    }

    /// A table in a box of its own, which scrolls where the page would be too narrow.
    fn table(&mut self, table: &Table) -> String {
        self.tables += 1;
        let label = escape(&format!("Table {}: {}", self.tables, self.heading));
        let mut html =
            format!("<div class=\"scroll\" role=\"group\" aria-label=\"{label}\" tabindex=\"0\">\n<table>\n");
        if table.has_head() {
            html += "<thead>\n<tr>";
            for (column, cell) in table.head.iter().enumerate() {
                // A header that says nothing is none.
                let (tag, scope) = if cell.is_empty() { ("td", "") } else { ("th", " scope=\"col\"") };
                let content = self.html(cell);
                let _ = write!(html, "<{tag}{scope}{}>{content}</{tag}>", class(table, column));
            }
            html += "</tr>\n</thead>\n";
        }
        html += "<tbody>\n";
        let is_appendix = !table.of_cells().is_empty();
        for row in &table.rows {
            let link = row.first().and_then(|cell| line_link(cell)).filter(|_| is_appendix);
            let id = link.and_then(record_line).and_then(|(_, line)| self.ids.of_row(line));
            html += &self.row(table, row, &id.map(|id| format!(" id=\"{id}\"")).unwrap_or_default());
        }
        html += "</tbody>\n";
        if let Some(total) = &table.total {
            html += &format!("<tfoot>\n{}</tfoot>\n", self.row(table, total, ""));
        }
        html + "</table>\n</div>\n"
    }

    fn row(&mut self, table: &Table, row: &[&[Event]], id: &str) -> String {
        let mut html = format!("<tr{id}>");
        for (column, cell) in row.iter().enumerate() {
            let names_row = column == 0 && !table.is_number(column);
            let (tag, scope) = if names_row { ("th", " scope=\"row\"") } else { ("td", "") };
            let content = self.html(cell);
            let _ = write!(html, "<{tag}{scope}{}>{content}</{tag}>", class_of_cell(table, column, cell));
        }
        html + "</tr>\n"
    }

    /// A picture that is a paragraph of its own.
    fn figure(&mut self, image: &[Event]) -> String {
        self.figures += 1;
        let label = escape(&format!("Figure {}: {}", self.figures, self.heading));
        let picture = self.html(image);
        format!(
            "<figure class=\"scroll\" role=\"group\" aria-label=\"{label}\" tabindex=\"0\">{picture}</figure>\n"
        )
    }

    /// As an image it cannot run anything, and its ids are its own.
    fn picture(&self, link: &str, alternative: &str) -> String {
        let alternative = escape(alternative);
        match self.charts.get(link) {
            Some(svg) => {
                let data = STANDARD.encode(svg);
                format!("<img alt=\"{alternative}\" src=\"data:image/svg+xml;base64,{data}\">")
            }
            None => format!("{}{alternative}</a>", links::start_tag(link, &self.cells)),
        }
    }
}

fn html<'a>(text: String) -> Event<'a> {
    Event::Html(text.into())
}

fn class(table: &Table, column: usize) -> &'static str {
    if table.is_number(column) { " class=\"number\"" } else { "" }
}

/// As `class`, and whether the text is so long that it has to be broken into lines.
fn class_of_cell(table: &Table, column: usize, cell: &[Event]) -> &'static str {
    let is_long = !table.is_number(column) && text(cell).chars().count() > LONG;
    if is_long { " class=\"long\"" } else { class(table, column) }
}

/// The place after the element that starts at `at`, or after the event if it is none.
fn after(events: &[Event], at: usize) -> usize {
    let mut depth = 0usize;
    for (offset, event) in events[at..].iter().enumerate() {
        match event {
            Event::Start(_) => depth += 1,
            Event::End(_) => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at + offset + 1;
        }
    }
    events.len()
}

fn is_picture(events: &[Event]) -> bool {
    matches!(events.first(), Some(Event::Start(Tag::Image { .. }))) && after(events, 0) == events.len()
}
