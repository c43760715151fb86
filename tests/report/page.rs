//! The report as a page: the same as the Markdown, in one file, and safe whatever the names in a record are.

use crate::records::{Engine, ended, write};
use crate::rendering::typical_run;
use assert_cmd::Command;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use evalfw::decide::criteria::Criteria;
use evalfw::record::{CellRecord, Outcome};
use evalfw::render::hosts;
use evalfw::render::page::{Charts, page};
use evalfw::render::report::{Report, render};
use proptest::prelude::*;
use scraper::{ElementRef, Html, Selector};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const HOSTILE: [&str; 4] = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"><svg onload=alert(1)> ' onclick='x",
    "[x](javascript:alert(1)) ![y](http://a.b/c.png) <https://a.b> &lt;b&gt;",
];

fn report(cells: &[CellRecord]) -> Report {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), cells);
    render(dir.path(), "", &Criteria::built_in().unwrap()).unwrap()
}

fn typical_page() -> String {
    report(&typical_run()).page("").unwrap()
}

fn all<'a>(page: &'a Html, selector: &str) -> Vec<ElementRef<'a>> {
    page.select(&Selector::parse(selector).unwrap()).collect()
}

fn only<'a>(page: &'a Html, selector: &str) -> ElementRef<'a> {
    let found = all(page, selector);
    assert_eq!(found.len(), 1, "{selector}");
    found[0]
}

fn text(element: ElementRef) -> String {
    element.text().collect()
}

/// Parses a page and checks what holds for every one: whole, self-contained, and without a way to run anything else.
fn checked(page: &str) -> Html {
    let parsed = Html::parse_document(page);
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    let mut ids = BTreeSet::new();
    for element in all(&parsed, "*") {
        let name = element.value().name();
        for (attribute, value) in element.value().attrs() {
            assert!(!attribute.starts_with("on") && attribute != "style", "{name} has {attribute}={value}");
            match attribute {
                "id" => assert!(ids.insert(value.to_owned()), "two elements have the id {value}"),
                "src" => assert!(
                    name == "img" && value.starts_with("data:image/svg+xml;base64,"),
                    "{name} {value}"
                ),
                "href" => assert!(name == "a" && !value.starts_with("javascript:"), "{name} {value}"),
                _ => {}
            }
        }
        let is_foreign =
            ["link", "iframe", "object", "embed", "base", "svg", "form", "input"].contains(&name);
        assert!(!is_foreign, "{name}");
    }
    for link in all(&parsed, "a[href^='#']") {
        let target = &link.attr("href").unwrap()[1..];
        assert!(ids.contains(target), "#{target} leads nowhere");
    }
    // Style and script are the page's own, and the policy lets nothing else run.
    let policy = only(&parsed, "meta[http-equiv='Content-Security-Policy']").attr("content").unwrap();
    for (element, directive) in [("style", "style-src"), ("script", "script-src")] {
        let own = text(only(&parsed, element));
        let hash = STANDARD.encode(Sha256::digest(own));
        assert!(policy.contains(&format!("; {directive} 'sha256-{hash}';")), "{policy}");
    }
    assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
    assert!(
        !text(only(&parsed, "style")).contains("url(") && !text(only(&parsed, "style")).contains("@import")
    );
    assert_eq!(only(&parsed, "html").attr("lang"), Some("en"));
    only(&parsed, "meta[name='viewport']");
    only(&parsed, "main");
    parsed
}

/// The cells of all tables of a Markdown text, without markup; read by the lines, not by a parser of Markdown.
fn markdown_tables(markdown: &str) -> Vec<Vec<String>> {
    let rows = markdown.lines().filter(|line| line.starts_with('|') && !line.starts_with("|-"));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| plain(cell.trim())).collect()).collect()
}

fn plain(cell: &str) -> String {
    let mut text = cell.replace("**", "").replace("<br>", "").replace(['\\', '`'], "");
    while let Some(middle) = text.find("](") {
        let end = middle + text[middle..].find(')').unwrap();
        text.replace_range(middle..=end, "");
        let start = text[..middle].rfind('[').unwrap();
        text.remove(start);
    }
    text
}

fn page_tables(page: &Html) -> Vec<Vec<String>> {
    let cells = Selector::parse("th, td").unwrap();
    all(page, "main tr").into_iter().map(|row| row.select(&cells).map(text).collect()).collect()
}

#[test]
fn the_page_is_whole_and_loads_nothing() {
    let parsed = checked(&typical_page());
    assert_eq!(text(only(&parsed, "title")), "QLoRA within 16 GB: which framework?");
    assert_eq!(text(only(&parsed, "h1")), "QLoRA within 16 GB: which framework?");
    let headings: Vec<String> = all(&parsed, "h2, h3").into_iter().map(text).collect();
    let listed: Vec<String> = all(&parsed, "nav a").into_iter().map(text).collect();
    assert_eq!(listed, headings);
}

#[test]
fn every_cell_of_the_tables_is_on_the_page() {
    let report = report(&typical_run());
    let is_empty = |row: &Vec<String>| row.iter().all(String::is_empty);
    let mut expected = markdown_tables(&report.markdown);
    assert!(expected.len() > 60, "{}", expected.len());
    // The header of a table of facts is empty, and then the page has none.
    expected.retain(|row| !is_empty(row));
    assert_eq!(page_tables(&checked(&report.page("").unwrap())), expected);
}

#[test]
fn the_record_alone_decides_the_bytes() {
    assert_eq!(typical_page(), typical_page());
}

#[test]
fn a_line_of_the_record_is_a_row_of_the_page() {
    let cells = typical_run();
    let parsed = checked(&typical_page());
    let rows = all(&parsed, "tr[id]");
    assert_eq!(rows.len(), cells.len());
    for (index, (row, cell)) in rows.iter().zip(&cells).enumerate() {
        assert_eq!(row.attr("id"), Some(format!("L{}", index + 1).as_str()));
        assert!(text(*row).contains(&cell.cell));
    }
    let trained =
        cells.iter().position(|c| c.cell.starts_with("candle-cpu/") && c.scenario.starts_with("train"));
    let line = trained.unwrap() + 1;
    let links = all(&parsed, &format!("a[href='#L{line}']"));
    assert!(links.len() > 2, "{}", links.len());
    for link in links {
        let title = format!("candle-cpu/qwen2.5-coder-0.5b/train-s256-b1/nf4/0: line {line} of cells.jsonl");
        assert_eq!((text(link), link.attr("title")), (line.to_string(), Some(title.as_str())));
    }
    assert!(all(&parsed, "a[href*='jsonl#L']").is_empty());
    assert_eq!(all(&parsed, "a[href='cells.jsonl']").len(), 2);
}

#[test]
fn charts_are_in_the_page_from_wherever_it_is_linked() {
    let report = report(&typical_run());
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &typical_run());
    let elsewhere = render(dir.path(), "my run/", &Criteria::built_in().unwrap()).unwrap();
    for page in [report.page("").unwrap(), elsewhere.page("my run/").unwrap()] {
        let parsed = checked(&page);
        let embedded: BTreeSet<String> = all(&parsed, "figure img")
            .into_iter()
            .map(|image| {
                assert!(!image.attr("alt").unwrap().is_empty());
                let data = image.attr("src").unwrap().split_once(',').unwrap().1;
                String::from_utf8(STANDARD.decode(data).unwrap()).unwrap()
            })
            .collect();
        assert_eq!(embedded, report.charts.iter().map(|c| c.svg.clone()).collect());
    }
}

#[test]
fn names_and_messages_stay_text() {
    for hostile in HOSTILE {
        let mut cells: Vec<CellRecord> = [hostile, "other"]
            .into_iter()
            .flat_map(|name| Engine::new(Box::leak(name.to_owned().into_boxed_str()), 2.0, 1.0).cells())
            .collect();
        cells[5] = ended(cells[5].clone(), Outcome::Failed, hostile);
        cells[5].error.as_mut().unwrap().stderr_tail = vec![hostile.to_owned()];
        for cell in &mut cells {
            cell.model.name = hostile.into();
            cell.model.origin = hostile.into();
            cell.environment.cpu = hostile.into();
            cell.framework = Some(hostile.into());
        }
        let report = report(&cells);
        let parsed = checked(&report.page("").unwrap());
        let embedded = all(&parsed, "img").len();
        assert_eq!(embedded, report.charts.len());
        assert!(text(only(&parsed, "main")).contains(hostile), "{hostile}");
        let named = all(&parsed, "tbody th").into_iter().filter(|cell| text(*cell) == hostile).count();
        assert!(named > 3, "{hostile}: {named}");
        assert!(text(only(&parsed, "pre")).contains(hostile));
    }
}

#[test]
fn what_the_markdown_lets_through_is_text_or_no_link() {
    let markdown = "# T <b>x</b>\n\n<script>alert(1)</script>\n\na<br>b <i>c</i> [d](javascript:alert(1)) \
                    [e](JAVASCRIPT:x) [f](a/b.md) ![g](http://a.b/c.png)\n\n| h |\n|---|\n| <u>i</u><br>j |\n";
    let parsed = checked(&page(markdown, &Charts::new()).unwrap());
    let main = text(only(&parsed, "main"));
    for shown in ["T <b>x</b>", "<script>alert(1)</script>", "<i>c</i>", "<u>i</u>j", "d e f g"] {
        assert!(main.contains(shown), "{shown} in {main}");
    }
    let links: Vec<_> = all(&parsed, "main a[href]").into_iter().map(|a| a.attr("href").unwrap()).collect();
    assert_eq!(links, ["a/b.md", "http://a.b/c.png"]);
    assert_eq!((all(&parsed, "main br").len(), all(&parsed, "img").len()), (2, 0));
}

#[test]
fn headings_of_one_name_have_ids_of_their_own() {
    let markdown = "# A\n\n## contents\n\n## x: y\n\n### x y\n\n### ***\n\n## L1\n\n### x y 2\n";
    let parsed = checked(&page(markdown, &Charts::new()).unwrap());
    let ids: Vec<_> = all(&parsed, "h2, h3").into_iter().map(|h| h.attr("id").unwrap()).collect();
    assert_eq!(ids, ["contents-2", "x-y", "x-y-2", "section", "l1", "x-y-2-2"]);
}

#[test]
fn totals_stand_below_the_rows_that_are_sorted() {
    let parsed = checked(&typical_page());
    let total = text(only(&parsed, "tfoot"));
    assert!(total.trim().starts_with("Total") && total.contains("100 %"), "{total}");
    assert!(!all(&parsed, "tbody tr").into_iter().any(|row| text(row).starts_with("Total")));
}

#[test]
fn a_merged_record_links_to_the_record_for_it_has_no_appendix() {
    let dir = tempfile::tempdir().unwrap();
    let mut cells = typical_run();
    for cell in &mut cells {
        cell.host = Some("<h>".into());
    }
    write(dir.path(), &cells);
    let output = dir.path().join("report.md");
    hosts::write(dir.path(), &output, "", &Criteria::built_in().unwrap()).unwrap();
    let parsed = checked(&fs::read_to_string(dir.path().join("report.html")).unwrap());
    assert!(all(&parsed, "a[href^='cells.jsonl#L']").len() > 10);
    assert!(all(&parsed, "thead th").into_iter().any(|th| text(th) == "<h>"));
}

fn evalfw(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::cargo_bin("evalfw").unwrap().current_dir(folder).args(arguments).assert().success();
    String::from_utf8(output.get_output().stdout.clone()).unwrap()
}

#[test]
fn the_command_writes_both_forms_or_the_one_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    write(&run, &typical_run());
    let there = |name: &str| dir.path().join(name).exists();

    let markdown = evalfw(dir.path(), &["report", "run", "--output", "-"]);
    let html = evalfw(dir.path(), &["report", "run", "--output", "-", "--format", "html"]);
    assert!(markdown.starts_with("# ") && html.starts_with("<!DOCTYPE html>"));
    assert!(!there("run/report.md") && !there("run/report.html"));

    evalfw(dir.path(), &["report", "run", "--format", "html"]);
    assert!(!there("run/report.md"));
    let told = evalfw(dir.path(), &["report", "run"]);
    assert!(told.contains("report.md") && told.contains("report.html"), "{told}");
    assert_eq!(fs::read_to_string(run.join("report.md")).unwrap(), markdown);
    assert_eq!(fs::read_to_string(run.join("report.html")).unwrap(), html);

    evalfw(dir.path(), &["report", "run", "--output", "a/page.html"]);
    let above = fs::read_to_string(dir.path().join("a/page.html")).unwrap();
    assert_eq!(above.replace("href=\"../run/cells.jsonl\"", "href=\"cells.jsonl\""), html);
    evalfw(dir.path(), &["report", "run", "--output", "b.md", "--format", "markdown"]);
    assert!(there("b.md") && !there("b.html") && !there("a/page.md"));
    evalfw(dir.path(), &["report", "run", "--output", "c.md"]);
    assert!(there("c.md") && there("c.html"));
}

/// Pieces that mean something in Markdown or in HTML.
fn piece() -> impl Strategy<Value = String> {
    let known = [
        "# ",
        "## ",
        "| ",
        "|---|\n",
        "\n",
        "\n\n",
        "[",
        "](",
        ")",
        "![",
        "<",
        ">",
        "</",
        "script",
        "img src=x",
        "onerror=x",
        "`",
        "```\n",
        "javascript:",
        "cells.jsonl#L1",
        "Line",
        "Total",
        "&",
        "&lt;",
        "\"",
        "'",
        "*",
        "- ",
        "\\",
        "<!--",
        "-->",
        "<br>",
        "{{ x }}",
        "{% raw %}",
        "\u{202e}",
        "\0",
    ];
    prop_oneof![4 => proptest::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,4}"]
}

proptest! {
    #[test]
    fn no_markdown_gets_out_of_its_text(pieces in proptest::collection::vec(piece(), 0..40)) {
        let markdown = pieces.concat();
        let parsed = checked(&page(&markdown, &Charts::new()).unwrap());
        prop_assert!(all(&parsed, "img").is_empty());
        let known = [
            "main", "h1", "h2", "h3", "p", "a", "div", "table", "thead", "tbody", "tfoot", "tr", "th", "td", "pre", "code",
            "em", "strong", "ul", "ol", "li", "br", "hr", "blockquote", "figure",
        ];
        for element in all(&parsed, "main, main *") {
            prop_assert!(known.contains(&element.value().name()), "{}", element.value().name());
        }
    }
}
