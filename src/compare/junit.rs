//! JUnit XML, which continuous integration shows: a suite per job, a case per metric.

use super::present::{change, figure, mark};
use super::{Comparison, Row, Verdict};
use crate::render::format::harmless;
use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

pub fn xml(comparison: &Comparison) -> Result<String> {
    let mut report = Report::new("evalfw compare");
    for rows in comparison.rows.chunk_by(|a, b| a.job == b.job) {
        let mut suite = TestSuite::new(harmless(&rows[0].job));
        suite.add_test_cases(rows.iter().map(|row| case(row, comparison)));
        report.add_test_suite(suite);
    }
    report.to_string().context("the JUnit report cannot be written")
}

fn case(row: &Row, comparison: &Comparison) -> TestCase {
    let mut status = match row.verdict {
        Verdict::Better | Verdict::Same => TestCaseStatus::success(),
        Verdict::Worse => TestCaseStatus::non_success(NonSuccessKind::Failure),
        Verdict::Inconclusive => TestCaseStatus::skipped(),
    };
    let text = format!("{}: {}{}", row.verdict.as_str(), in_words(row), mark(comparison));
    let text = harmless(&text);
    status.set_message(text.as_str());
    let mut case = TestCase::new(row.metric.map_or("outcome", |metric| metric.name()), status);
    case.set_classname(harmless(&row.job));
    case.set_system_out(text);
    case
}

fn in_words(row: &Row) -> String {
    let figures = format!("base {}, head {}", figure(row, &row.base), figure(row, &row.head));
    let change = row.ratio.as_ref().map(|ratio| format!(", {}", change(ratio)));
    let reason = row.reason.as_ref().map(|reason| format!("; {reason}"));
    figures + &change.unwrap_or_default() + &reason.unwrap_or_default()
}
