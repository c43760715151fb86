//! Writing for people and pipes: a reader that stops reading is no error, and never a panic.

use anyhow::{Context, Result};
use std::io::{ErrorKind, Write};

/// Writes results to standard output.
pub fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output cannot be written"),
    }
}

/// Whether the character would do something to a terminal other than to be shown or to end a line.
pub fn steers_a_terminal(c: char) -> bool {
    let turns_direction =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (c.is_control() && c != '\n') || turns_direction
}

/// Writes a line for people to standard error. If nobody can read it the work goes on.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", line.replace(steers_a_terminal, " "));
}
