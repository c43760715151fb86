//! The report as one HTML page that loads nothing, made from its Markdown and its charts.
//!
//! Names and messages in a report come from outside. The Markdown escapes them, and the page does not rely on that:
//! raw HTML becomes text, links keep to safe schemes, and a Content-Security-Policy lets run and load only what is
//! embedded here.

mod anchors;
mod body;
mod links;
mod table;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use body::Body;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, context};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

// The ending of the name turns HTML's escaping on.
const TEMPLATE_NAME: &str = "page.html.j2";
const TEMPLATE: &str = include_str!("../../../reports/page.html.j2");
const STYLE: &str = include_str!("../../../reports/page.css");
const SCRIPT: &str = include_str!("../../../reports/page.js");

/// SVG by the link that leads to it in the Markdown.
pub type Charts = BTreeMap<String, String>;

/// The page of a report in Markdown. A picture that is not among `charts` becomes a link.
pub fn page(markdown: &str, charts: &Charts) -> Result<String> {
    // HTML has no place for control characters, and names may hold some.
    let is_control = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    let body = Body::of(&markdown.replace(is_control, "\u{fffd}"), charts);
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.add_template(TEMPLATE_NAME, TEMPLATE)?;
    Ok(environment.get_template(TEMPLATE_NAME)?.render(context! {
        title => body.title,
        sections => Serde(&body.contents),
        body => body.html,
        style => STYLE,
        script => SCRIPT,
        style_source => source(STYLE),
        script_source => source(SCRIPT),
    })?)
}

/// Where the page of a report in Markdown goes: beside it, by the same name.
pub fn beside(markdown: &Path) -> PathBuf {
    markdown.with_extension("html")
}

/// As a Content-Security-Policy names a text that a page may embed (CSP Level 3, section 2.3.1).
fn source(text: &str) -> String {
    format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)))
}

/// Text as the content of an element or as an attribute's value.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}
