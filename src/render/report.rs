//! The decision report.

use super::beside;
use super::charts::{self, Chart, Kind};
use super::doubts::{Doubt, doubts};
use super::drawings;
use super::facts::Facts;
use super::format::{add_filters, link};
use super::limits::{LimitRow, limit_rows};
use super::page::{self, Charts, page};
use super::png::png;
use super::prose;
use super::quality::{QualityRow, quality_rows};
use super::sections::contrast::{Difference, differences};
use super::sections::frameworks::{FrameworkSection, sections};
use super::sections::predictions::{Predictions, predictions};
use super::sections::recommendations::{Recommendation, recommendations};
use super::sections::risks::{Risk, risks};
use super::sections::success::{SuccessCriterion, success};
use super::stock::StockRow;
use super::tables::{LossAgreement, ModelTables};
use super::trace::{Lines, TraceRow, rows};
use super::troubles::{Trouble, troubles};
use super::tuning::{TuningRow, tuning_rows};
use super::unsettled::unsettled;
use crate::decide::criteria::Criteria;
use crate::decide::jobs::{Job, arrange, compared, models};
use crate::decide::{Decision, decide};
use crate::record::{self, CellRecord, ModelRecord, record_file, record_folder};
use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{UndefinedBehavior, context};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

const TEMPLATE_NAME: &str = "report.md.j2";
const TEMPLATE: &str = include_str!("../../reports/report.md.j2");

/// Everything the report says, as data.
#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    pub criteria: Criteria,
    pub decision: Decision,
    /// One for each framework, by name.
    pub frameworks: Vec<FrameworkSection>,
    /// In what the first one differs from those that come next.
    pub trade_offs: Vec<TradeOff>,
    pub predictions: Option<Predictions>,
    pub recommendations: Vec<Recommendation>,
    pub success: Vec<SuccessCriterion>,
    pub risks: Vec<Risk>,
    pub facts: Facts,
    /// Figures of engines that can be compared, by model from large to small.
    pub models: Vec<ModelTables>,
    /// Figures of software adapters, apart.
    pub software: Vec<ModelTables>,
    /// Time to quality, of all engines.
    pub quality: Vec<QualityRow>,
    /// What the choice of kernels took, of all engines that make one.
    pub tuning: Vec<TuningRow>,
    pub troubles: Vec<Trouble>,
    /// Cells whose speed is doubtful.
    pub doubts: Vec<Doubt>,
    pub limits: Vec<LimitRow>,
    /// How memory was measured, by the record's own word.
    pub memory_measures: Vec<String>,
    pub trace: Vec<TraceRow>,
    /// Lines of the record whose cell was measured again.
    pub repeated_attempts: usize,
}

/// What the one that is first most often has of another one.
#[derive(Debug, Clone, Serialize)]
pub struct TradeOff {
    pub first: String,
    pub second: String,
    pub differences: Vec<Difference>,
}

/// A report that is not on disk yet.
#[derive(Debug, Clone)]
pub struct Report {
    pub markdown: String,
    pub charts: Vec<Chart>,
    pub findings: Findings,
}

/// Renders the report of `run` (a run's folder, or the record in it). `link_prefix` leads from the
/// report's folder to the record's: empty, or ending in `/`.
pub fn render(run: &Path, link_prefix: &str, criteria: &Criteria) -> Result<Report> {
    let file = record_file(run);
    let cells = record::read(&file)?;
    let lines = Lines::read(&file)?;
    let findings = Findings::of(&cells, &lines, criteria.clone());
    let mut charts = draw(&cells, &findings.decision)?;
    charts.extend(drawings::of_decision(&findings)?);
    let record_name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let markdown = markdown(&findings, &charts, lines, link_prefix, &record_name)?;
    Ok(Report { markdown, charts, findings })
}

impl Report {
    /// The same as one HTML page, with its charts in it. `link_prefix` is that of [`render`].
    pub fn page(&self, link_prefix: &str) -> Result<String> {
        let linked = |chart: &Chart| (link(&format!("{link_prefix}{}", chart.file)), chart.svg.clone());
        page(&self.markdown, &self.charts.iter().map(linked).collect::<Charts>())
    }
}

/// Writes the report to `output`, its charts beside the record, and the same as a page beside `output`.
pub fn write(run: &Path, output: &Path, link_prefix: &str, criteria: &Criteria) -> Result<Report> {
    let report = write_markdown(run, output, link_prefix, criteria)?;
    write_file(&page::beside(output), &report.page(link_prefix)?)?;
    Ok(report)
}

/// Writes the report to `output`, and its charts beside the record.
pub fn write_markdown(run: &Path, output: &Path, link_prefix: &str, criteria: &Criteria) -> Result<Report> {
    let report = render(run, link_prefix, criteria)?;
    let folder = record_folder(run);
    for chart in &report.charts {
        let path = folder.join(&chart.file);
        write_file(&path, &chart.svg)?;
        write_file(&path.with_extension("png"), png(&chart.svg)?)?;
    }
    write_file(output, &report.markdown)?;
    Ok(report)
}

/// Writes beside the target and renames: a full disk must not leave half a report where a whole one was.
pub fn write_file(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let write = || {
        std::fs::create_dir_all(parent)?;
        let mut file = tempfile::NamedTempFile::new_in(parent)?;
        file.write_all(content.as_ref())?;
        readable_by_all(file.as_file())?;
        file.persist(path).map_err(|e| e.error)?;
        std::io::Result::Ok(())
    };
    write().with_context(|| format!("{}: cannot be written", path.display()))
}

/// Temporary files are private; a report is not.
#[cfg(unix)]
fn readable_by_all(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable_by_all(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

impl Findings {
    pub fn of(cells: &[CellRecord], lines: &Lines, criteria: Criteria) -> Self {
        let decision = decide(cells, &criteria);
        let all = arrange(cells);
        let jobs = compared(&all);
        let of_jobs = |jobs: &[Job]| -> Vec<ModelRecord> { models(jobs).into_iter().cloned().collect() };
        let models = of_jobs(&jobs);
        let tables = |software: bool| {
            let of_model = |model: &ModelRecord| {
                let own = jobs
                    .iter()
                    .filter(|j| j.model.name == model.name && decision.is_software(j.engine) == software);
                let own: Vec<&Job> = own.collect();
                let tables = || ModelTables::of(model, &own, criteria.memory_target_bytes(), lines);
                (!own.is_empty()).then(tables)
            };
            models.iter().rev().filter_map(of_model).collect()
        };
        let compared_models: Vec<ModelTables> = tables(false);
        let agreement: Vec<&LossAgreement> = compared_models.iter().flat_map(|m| &m.agreement).collect();
        let predictions = predictions(cells, &jobs, &criteria);
        Self {
            facts: Facts::of(cells, of_jobs(&all)),
            frameworks: sections(&jobs, &decision, &criteria),
            trade_offs: trade_offs(&decision, &criteria),
            recommendations: recommendations(cells, &decision),
            success: success(&jobs, &decision, &criteria, &agreement, predictions.as_ref()),
            risks: risks(cells, &jobs, &decision, &criteria, predictions.as_ref()),
            predictions,
            models: compared_models,
            software: tables(true),
            quality: quality_rows(&all, cells, lines),
            tuning: tuning_rows(&all, lines),
            troubles: troubles(&all, lines),
            doubts: doubts(&all, lines),
            limits: limit_rows(cells, lines),
            memory_measures: memory_measures(cells),
            trace: rows(cells, lines),
            repeated_attempts: lines.superseded,
            decision,
            criteria,
        }
    }
}

/// With so many of those that come next the first one is compared.
const RIVALS: usize = 2;

fn trade_offs(decision: &Decision, criteria: &Criteria) -> Vec<TradeOff> {
    let Some((ranking, first)) = decision.headline().and_then(|r| Some((r, r.first()?))) else {
        return Vec::new();
    };
    let of = |second: &str| {
        let (own, other) = (ranking.candidate(first)?, ranking.candidate(second)?);
        Some(TradeOff {
            first: prose::with_framework(ranking, first),
            second: prose::with_framework(ranking, second),
            differences: differences(own, other, criteria),
        })
    };
    ranking.after_first().into_iter().take(RIVALS).filter_map(of).collect()
}

fn memory_measures(cells: &[CellRecord]) -> Vec<String> {
    let measured = cells.iter().filter(|cell| !cell.samples.phases.is_empty());
    let all: BTreeSet<String> = measured
        .map(|cell| cell.samples.memory_measure.clone().unwrap_or_else(|| "resident".to_owned()))
        .collect();
    all.into_iter().collect()
}

/// The charts of each model. Software adapters have a memory chart of their own, on a model that no
/// other engine ran; the losses of all engines are numerics and stand on one axis.
fn draw(cells: &[CellRecord], decision: &Decision) -> Result<Vec<Chart>> {
    let all_jobs = arrange(cells);
    let jobs = compared(&all_jobs);
    let comparable: Vec<Job> = jobs.iter().filter(|j| !decision.is_software(j.engine)).cloned().collect();
    // Those that are compared come first and get the colours that differ most.
    let mut engines: Vec<&str> =
        all_jobs.iter().filter(|j| j.ok().next().is_some()).map(|j| j.engine).collect();
    engines.sort_by_key(|e| (decision.is_software(e), *e));
    engines.dedup();
    let mut all = Vec::new();
    for model in models(&jobs).iter().rev().map(|m| m.name.as_str()) {
        let is_compared = comparable.iter().any(|j| j.model.name == model);
        let memory_jobs = if is_compared { &comparable } else { &jobs };
        all.extend(charts::memory(memory_jobs, model, &engines, decision.memory_target_bytes)?);
        all.extend(charts::loss(&jobs, model, &engines)?);
    }
    let is_drawn = |j: &&Job| j.is_kind("quality") && !decision.is_software(j.engine);
    let quality: Vec<&Job> = all_jobs.iter().filter(is_drawn).collect();
    for scenario in quality.iter().map(|j| j.scenario).collect::<BTreeSet<_>>() {
        let jobs: Vec<&Job> = quality.iter().copied().filter(|j| j.scenario == scenario).collect();
        all.extend(charts::quality(&jobs, &engines)?);
    }
    Ok(all)
}

fn markdown(
    findings: &Findings,
    charts: &[Chart],
    lines: Lines,
    link_prefix: &str,
    record_name: &str,
) -> Result<String> {
    let mut environment = template_environment()?;
    environment.add_function("line_of", move |cell: &str| lines.line(cell));
    environment.add_template(TEMPLATE_NAME, TEMPLATE)?;
    let template = environment.get_template(TEMPLATE_NAME)?;
    let linked = |kind: Kind| -> BTreeMap<&str, String> {
        let of_kind = charts.iter().filter(|c| c.kind == kind);
        of_kind.map(|c| (c.subject.as_str(), link(&format!("{link_prefix}{}", c.file)))).collect()
    };
    let dominated: Vec<Vec<String>> = findings
        .decision
        .rankings
        .iter()
        .map(|r| r.dominated.iter().map(beside::dominated).collect())
        .collect();
    let stock: Vec<&StockRow> = findings.models.iter().flat_map(|m| &m.stock).collect();
    let rendered = template.render(context! {
        f => Serde(findings),
        summary => prose::summary(&findings.decision, &stock),
        conclusion => prose::conclusion(&findings.decision),
        limits => unsettled(&findings.decision, &findings.facts, &findings.criteria),
        next_best => Serde(prose::next_best(&findings.decision)),
        rule => prose::rule(&findings.criteria.decision),
        dominated,
        record => link(&format!("{link_prefix}{record_name}")),
        memory_charts => Serde(linked(Kind::Memory)),
        loss_charts => Serde(linked(Kind::Loss)),
        stacked_charts => Serde(linked(Kind::Stacked)),
        acceptability_charts => Serde(linked(Kind::Acceptability)),
        shares_charts => Serde(linked(Kind::Shares)),
        predicted_charts => Serde(linked(Kind::Predicted)),
        quality_charts => Serde(linked(Kind::Quality)),
    })?;
    Ok(collapse_blank_lines(&rendered))
}

/// For templates of Markdown, with the filters for figures and names.
pub fn template_environment() -> Result<minijinja::Environment<'static>> {
    let mut environment = minijinja::Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // A line that holds only a tag leaves nothing behind.
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    add_filters(&mut environment);
    Ok(environment)
}

/// Sections that are left out leave blank lines behind.
pub fn collapse_blank_lines(text: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim_end) {
        if !(line.is_empty() && lines.last().is_none_or(|last| last.is_empty())) {
            lines.push(line);
        }
    }
    let mut collapsed = lines.join("\n");
    collapsed.truncate(collapsed.trim_end().len());
    collapsed.push('\n');
    collapsed
}
