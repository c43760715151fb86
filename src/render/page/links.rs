//! Where links may lead.

use super::anchors::{record_line, row_id};
use super::escape;
use std::collections::BTreeMap;

/// The start tag of a link. A line of the record that has a row on the page leads to that row.
pub fn start_tag(link: &str, cells: &BTreeMap<String, String>) -> String {
    match (cells.get(link), record_line(link)) {
        (Some(cell), Some((record, line))) => {
            let title = escape(&format!("{cell}: line {line} of {record}"));
            format!("<a href=\"#{}\" title=\"{title}\">", row_id(line))
        }
        _ if is_safe(link) => format!("<a href=\"{}\">", escape(link)),
        // An anchor without a target is text.
        _ => "<a>".to_owned(),
    }
}

/// A path, or an address of the web: no `javascript:`, which would run here.
/// Nor a place on this page: a report has no such links, and where one came from a name it would lead nowhere.
fn is_safe(link: &str) -> bool {
    if link.starts_with('#') {
        return false;
    }
    let scheme = link.split(['/', '?', '#']).next().and_then(|start| start.split_once(':')).map(|(s, _)| s);
    scheme.is_none_or(|s| s.eq_ignore_ascii_case("https") || s.eq_ignore_ascii_case("http"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_and_the_web_are_linked() {
        for link in ["cells.jsonl", "../my%20run/a:b", "a/b?c:d", "https://a.b/c", "HTTP://a.b", ""] {
            assert!(is_safe(link), "{link}");
        }
        for link in [
            "javascript:alert(1)",
            "JavaScript:alert(1)",
            "data:text/html,x",
            " javascript:x",
            "file:///x",
            "#L1",
        ] {
            assert!(!is_safe(link), "{link}");
        }
    }
}
