//! Numbers as people write them into tables.

/// A number with the digits that it was stated to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figure {
    pub value: f64,
    /// Digits after the point.
    pub decimals: usize,
    /// 100 of `87 %`, 10 of `9/10`.
    pub of: Option<f64>,
    pub line: usize,
}

impl Figure {
    /// Half of the last digit: `value` is right for whatever rounds to it, up or down.
    pub fn tolerance(&self) -> f64 {
        0.5 * 10f64.powi(-(self.decimals.min(15) as i32)) + super::check::EPSILON
    }

    pub fn shown(&self) -> String {
        format!("{:.*}", self.decimals, self.value)
    }
}

/// `9`, `8.70`, `8,7`, `25 %`, `9/10`, and behind any of them a second number in brackets: `9 (2.25)`.
/// `None` for everything else, so that nothing is read that was not meant.
pub(super) fn parse(text: &str, line: usize) -> Option<(Figure, Option<Figure>)> {
    let text = text.trim();
    let (first, second) = match text.strip_suffix(')').and_then(|t| t.split_once('(')) {
        Some((first, second)) => (first, Some(second)),
        None => (text, None),
    };
    let second = match second {
        Some(inner) => Some(single(inner, line).filter(|f| f.of.is_none())?),
        None => None,
    };
    Some((single(first, line)?, second))
}

fn single(text: &str, line: usize) -> Option<Figure> {
    let text = text.trim();
    if let Some(number) = text.strip_suffix('%') {
        let (value, decimals) = decimal(number)?;
        return Some(Figure { value, decimals, of: Some(100.0), line });
    }
    if let Some((number, of)) = text.split_once('/') {
        let ((value, decimals), (of, _)) = (decimal(number)?, decimal(of)?);
        return (of > 0.0).then_some(Figure { value, decimals, of: Some(of), line });
    }
    let (value, decimals) = decimal(text)?;
    Some(Figure { value, decimals, of: None, line })
}

/// Digits with a point, or with a comma and at most two digits behind it: `1,000` is not clear.
fn decimal(text: &str) -> Option<(f64, usize)> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix(['-', '−']) {
        Some(digits) => (-1.0, digits),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    let (whole, fraction) = match digits.split_once(['.', ',']) {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (digits, None),
    };
    let comma = digits.contains(',');
    let all_digits = |t: &str| !t.is_empty() && t.len() <= 15 && t.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || fraction.is_some_and(|f| !all_digits(f) || (comma && f.len() > 2)) {
        return None;
    }
    let fraction = fraction.unwrap_or("");
    let value: f64 = format!("{whole}.{fraction}0").parse().ok()?;
    Some((sign * value, fraction.len()))
}

/// `1`, `1.`, `#1`, `1st`, `1.5`.
pub(super) fn rank(text: &str, line: usize) -> Option<Figure> {
    let text = text.trim().trim_start_matches('#');
    let text = ["st", "nd", "rd", "th", "."].iter().find_map(|end| text.strip_suffix(end)).unwrap_or(text);
    single(text, line).filter(|f| f.of.is_none() && f.value >= 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        let read = |text: &str| parse(text, 1).map(|(f, c)| (f.value, f.decimals, f.of, c.map(|c| c.value)));
        assert_eq!(read(" 8.60 "), Some((8.6, 2, None, None)));
        assert_eq!(read("25 %"), Some((25.0, 0, Some(100.0), None)));
        assert_eq!(read("25\u{a0}%"), Some((25.0, 0, Some(100.0), None)));
        assert_eq!(read("9/10"), Some((9.0, 0, Some(10.0), None)));
        assert_eq!(read("9 (2.25)"), Some((9.0, 0, None, Some(2.25))));
        assert_eq!(read("9/10 (2,25)"), Some((9.0, 0, Some(10.0), Some(2.25))));
        assert_eq!(read("−1"), Some((-1.0, 0, None, None)));
        for text in [
            "", "nine", "9*", "9 (±1)", "1,000", "1e3", "inf", "NaN", "9/0", "9 (25 %)", "8..6", "9 10", ".5",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn ranks_are_read_as_people_write_them() {
        for text in ["1", "1.", "#1", "1st"] {
            assert_eq!(rank(text, 1).map(|f| f.value), Some(1.0), "{text}");
        }
        assert_eq!(rank("first", 1), None);
        assert_eq!(rank("0", 1), None);
    }
}
