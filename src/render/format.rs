//! Numbers and foreign text as the report prints them.

use crate::output::steers_a_terminal;
use minijinja::Environment;

/// Characters that mean something in Markdown, wherever they stand in a line.
const MARKUP: &[char] = &['\\', '`', '*', '[', ']', '<', '>', '|', '&', '~', '$', '#'];

/// Makes the filters known to the templates.
pub fn add_filters(environment: &mut Environment) {
    environment.add_filter("md", |text: &str| markdown(text));
    environment.add_filter("with_code", with_code);
    environment.add_filter("distance", distance);
    environment.add_filter("gb", gb);
    environment.add_filter("mb", |bytes: f64| format!("{:.0}", bytes / 1e6));
    environment.add_filter("sig", significant);
    environment.add_filter("points", points);
    environment.add_filter("percent", percent);
    environment.add_filter("hundredths", |value: f64| format!("{value:.2}"));
    environment.add_filter("plain", plain);
    environment.add_filter("size", size);
    environment.add_filter("listed", |items: Vec<String>| {
        list(&items.iter().map(|i| markdown(i)).collect::<Vec<_>>())
    });
    environment.add_filter("loss", |nats: f64| format!("{nats:.4}"));
    environment.add_filter("parameters", parameters);
    environment.add_filter("fence", fence);
}

/// Text from outside, so that it cannot become markup, end a table cell or start a new line.
pub fn markdown(text: &str) -> String {
    escape(&harmless(text))
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let characters: Vec<char> = text.chars().collect();
    for (index, &c) in characters.iter().enumerate() {
        // An underscore inside a word is none of Markdown's business.
        let in_word =
            |i: Option<usize>| i.and_then(|i| characters.get(i)).is_some_and(|c| c.is_alphanumeric());
        let is_emphasis = c == '_' && !(in_word(index.checked_sub(1)) && in_word(Some(index + 1)));
        if MARKUP.contains(&c) || is_emphasis {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// As [`markdown`], but what stands between single backticks stays code.
fn with_code(text: &str) -> String {
    let text = harmless(text);
    let parts: Vec<&str> = text.split('`').collect();
    let is_paired = parts.len() % 2 == 1 && parts.iter().skip(1).step_by(2).all(|code| !code.is_empty());
    // Two spans that touch would make a fence of two backticks.
    let is_apart =
        parts.iter().enumerate().all(|(i, p)| i % 2 == 1 || i == 0 || i + 1 == parts.len() || !p.is_empty());
    if !(is_paired && is_apart) {
        return markdown(&text);
    }
    let part = |(i, part): (usize, &&str)| {
        if i % 2 == 1 { format!("`{part}`") } else { escape(part) }
    };
    parts.iter().enumerate().map(part).collect()
}

/// `at most 0.0012`, or that it is less than can be printed.
fn distance(value: f64) -> String {
    if value > 0.0 && value < 1e-6 {
        "less than 0.000001".to_owned()
    } else {
        format!("at most {}", significant(value))
    }
}

/// Names and messages come from files: on one line, without what steers a terminal or turns the direction of text.
pub fn harmless(text: &str) -> String {
    let steers = |c: char| c == '\n' || steers_a_terminal(c) || matches!(c, '\u{fffe}' | '\u{ffff}');
    let plain: String = text.chars().map(|c| if steers(c) { ' ' } else { c }).collect();
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `45 s`, `12 min`, `3 h 5 min`.
pub fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        _ if seconds < 120.0 => format!("{seconds:.0} s"),
        0..60 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

/// A fence for a code block that no line of `text` can close.
fn fence(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    "`".repeat(3.max(longest + 1))
}

/// Bytes in GB of 10^9 bytes.
pub fn gb(bytes: f64) -> String {
    format!("{:.2}", bytes / 1e9)
}

/// Three significant digits, without an exponent.
pub fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor() as i32;
    let decimals = (2 - magnitude).clamp(0, 6) as usize;
    let text = format!("{value:.decimals$}");
    // 9.996 is rounded up to 10.00: one digit too many.
    let rounded_up = text.parse::<f64>().is_ok_and(|v| v.abs().log10().floor() as i32 > magnitude);
    if rounded_up && decimals > 0 { format!("{value:.*}", decimals - 1) } else { text }
}

pub fn points(score: f64) -> String {
    format!("{score:.1}")
}

/// A share of 1 in percent.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// At most two decimals, and none that are zero: `16`, `0.25`.
pub fn plain(value: f64) -> String {
    format!("{}", (value * 100.0).round() / 100.0)
}

/// Bytes in GB, or in MB where GB would say nothing.
fn size(bytes: f64) -> String {
    if bytes < 1e8 { format!("{} MB", significant(bytes / 1e6)) } else { format!("{} GB", gb(bytes)) }
}

pub fn parameters(count: u64) -> String {
    match count {
        1_000_000_000.. => format!("{:.2} billion", count as f64 / 1e9),
        _ => format!("{} million", significant(count as f64 / 1e6)),
    }
}

/// `a`, `a and b`, `a, b and c`.
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// A link target: whatever is not plainly safe in a path is percent-encoded.
pub fn link(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' => {
                encoded.push(char::from(byte))
            }
            _ => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_break_out_of_a_table_cell() {
        assert_eq!(markdown("a|b `c`\n*d*"), r"a\|b \`c\` \*d\*");
        assert_eq!(markdown("<b> & [x](y)"), r"\<b\> \& \[x\](y)");
        assert_eq!(markdown("model.layers.0_a _b_"), r"model.layers.0_a \_b\_");
    }

    #[test]
    fn only_paired_backticks_make_code() {
        assert_eq!(with_code("run `a_*`\nnow"), "run `a_*` now");
        assert_eq!(with_code("<b> `x` *y*"), r"\<b\> `x` \*y\*");
        assert_eq!(with_code("`open"), r"\`open");
        assert_eq!(with_code("``` <b>"), r"\`\`\` \<b\>");
        assert_eq!(with_code("`a``b`"), r"\`a\`\`b\`");
    }

    #[test]
    fn durations_are_as_long_as_they_need() {
        let cases = [(45.0, "45 s"), (300.0, "5 min"), (3_600.0, "1 h 0 min"), (11_100.0, "3 h 5 min")];
        for (seconds, expected) in cases {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn a_fence_is_longer_than_any_in_the_text() {
        assert_eq!(fence("plain"), "```");
        assert_eq!(fence("```` x ``"), "`````");
    }

    #[test]
    fn three_significant_digits() {
        let cases = [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.0, "1.00"), (0.01234, "0.0123")];
        for (value, expected) in cases {
            assert_eq!(significant(value), expected);
        }
        assert_eq!(significant(9.996), "10.0");
        assert_eq!(significant(0.0), "0");
    }

    #[test]
    fn links_are_encoded() {
        assert_eq!(link("my run/charts/a (1).svg"), "my%20run/charts/a%20%281%29.svg");
    }
}
