//! The report as one HTML page: no script, no font, no file beside it; plots are SVG in the page.
//!
//! Colours are told by CSS variables, so that the page reads in a dark room and on paper.

use super::load::Load;
use super::plot::{Axis, Bar, COLOURS, Scale, Series, bars, escaped, lines, short};
use super::result::{Direction, Results, Run};
use super::summary::{self, Row, shown};
use crate::environment::FileFacts;
use std::fmt::Write;

const STYLE: &str = "
:root { color-scheme: light dark; --ink:#1d2330; --soft:#566074; --line:#dfe3ea; --band:#f5f7fa; --paper:#fff;
  --s0:#1f6feb; --s1:#d1495b; --s2:#2a8f5c; --s3:#8a5cd1; --s4:#b36b00; --s5:#0e8a99; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e8f0; --soft:#a3adc0; --line:#333b49; --band:#1b212b; --paper:#14181f;
  --s0:#6ea8fe; --s1:#f28b97; --s2:#6fcf9b; --s3:#b99bf0; --s4:#e6b25c; --s5:#5cc8d6; } }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 78rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { color: var(--soft); margin: .3rem 0; } ul { padding-left: 1.2rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-weight: 600; font-size: .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; } th.text, td.text { text-align: left; } tr.first td { border-top: 2px solid var(--line); } tr:hover td { background: var(--band); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 .6rem; color: var(--soft); font-size: .9rem; }
.key i { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; margin-right: .4rem; vertical-align: -2px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; } svg text.name { font-size: 12px; }
.grid { stroke: var(--line); } .axis, .tick { stroke: var(--soft); } .plot { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 4; } .faint { stroke-width: 1.4; stroke-opacity: .75; }
@media print { :root { color-scheme: light; --ink:#000; --soft:#333; --line:#bbb; --band:#f2f2f2; --paper:#fff;
  --s0:#1f6feb; --s1:#d1495b; --s2:#2a8f5c; --s3:#8a5cd1; --s4:#b36b00; --s5:#0e8a99; }
  body { font-size: 10pt; margin: 0; padding: 0; max-width: none; } h2 { break-after: avoid; } .key { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } tr { break-inside: avoid; }
  th, td { padding: .12rem .3rem; } th { white-space: normal; }
  .plots { grid-template-columns: 1fr 1fr; } figcaption { font-size: 8.5pt; } .plots svg text { font-size: 15px; } svg.bars text { font-size: 13.5px; } }";

/// The page.
pub fn page(results: &Results) -> String {
    let (subjects, rows) = (results.subjects(), summary::rows(results));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>ashlar bench</title><style>{STYLE}</style>\n<h1>ashlar bench</h1>\n<p>{}</p>\n<p>{}</p>\n",
        escaped(&results.environment.line()),
        escaped(&summary::setting(results))
    );
    let key = key(&subjects);
    page += "<h2>Medians of the rounds</h2>\n";
    page += &medians(&rows, &subjects);
    for note in summary::notes(results) {
        let _ = writeln!(page, "<p>Note: {}</p>", escaped(&note));
    }
    let groups = by_depth(&rows);
    if groups.iter().any(|(_, loads)| loads.len() > 1) {
        let _ = write!(page, "<h2>IOs a second and latency against depth</h2>\n{key}<div class=\"plots\">");
        for (pattern, loads) in groups.iter().filter(|(_, loads)| loads.len() > 1) {
            page += &against_depth(pattern, loads, &rows, &subjects);
        }
        page += "</div>\n";
    } else {
        page += "<h2>IOs a second</h2>\n<figure>";
        page += &iops_bars(&rows, &subjects);
        page += "</figure>\n";
    }
    let _ = write!(page, "<h2>Latency by percentile</h2>\n{key}<div class=\"plots\">");
    for load in results.loads() {
        for direction in Direction::of(load) {
            let caption = of_direction(load.label(), load, *direction);
            page += &figure(&caption, &percentiles(results, load, *direction, &subjects));
        }
    }
    page += "</div>\n";
    if results.runs.iter().any(|run| !run.timeline.is_empty()) {
        let _ = write!(page, "<h2>Time line, a line for each round</h2>\n{key}<div class=\"plots\">");
        for load in results.loads() {
            page += &figure(&load.label(), &timeline(results, load, &subjects));
        }
        page += "</div>\n";
    }
    page += "<h2>Processor time for each IO</h2>\n<div class=\"key\"><span><i style=\"background:var(--soft)\"></i>client</span>\
             <span><i style=\"background:var(--s0)\"></i>servers, in the colour of the subject</span></div><figure>";
    page += &cpu_bars(&rows, &subjects);
    page += "</figure>\n<h2>Processes</h2>\n";
    page += &processes(results);
    page += "<h2>Environment</h2>\n<ul>";
    let unknown = || vec!["it is not known what `ashlar tune check` finds wanting".to_owned()];
    let tuning = results
        .tuning
        .as_ref()
        .map_or_else(unknown, |wanting| wanting.iter().map(|line| format!("not tuned: {line}")).collect());
    let files = results.files.iter().map(FileFacts::line);
    let revision = (!results.revision.is_empty()).then(|| format!("source {}", results.revision));
    for line in files.chain(results.disk.iter().cloned()).chain(revision).chain(tuning) {
        let _ = write!(page, "<li>{}</li>", escaped(&line));
    }
    page + "</ul>\n</html>\n"
}

/// Which colour is whose.
fn key(subjects: &[&str]) -> String {
    let one = |(nth, name): (usize, &&str)| {
        format!("<span><i style=\"background:var(--s{})\"></i>{}</span>", nth % COLOURS, escaped(name))
    };
    format!("<div class=\"key\">{}</div>\n", subjects.iter().enumerate().map(one).collect::<String>())
}

fn figure(caption: &str, svg: &str) -> String {
    format!("<figure><figcaption>{}</figcaption>{svg}</figure>\n", escaped(caption))
}

/// A caption that names the direction where a load has both.
fn of_direction(caption: String, load: &Load, direction: Direction) -> String {
    if Direction::of(load).len() > 1 { format!("{caption}: {}", direction.name()) } else { caption }
}

fn colour(subjects: &[&str], name: &str) -> usize {
    subjects.iter().position(|other| *other == name).unwrap_or(0)
}

/// A table; the first `text` columns are words. A row that begins with a new first cell is set apart.
fn html_table(header: &[&str], text: usize, rows: &[Vec<String>]) -> String {
    let class = |nth: usize| if nth < text { " class=\"text\"" } else { "" };
    let mut html = String::from("<div class=\"wide\"><table><tr>");
    for (nth, name) in header.iter().enumerate() {
        let _ = write!(html, "<th{}>{}</th>", class(nth), escaped(name));
    }
    let mut before: Option<&String> = None;
    for row in rows {
        let new = before.is_some_and(|before| *before != row[0]);
        html += if new { "</tr>\n<tr class=\"first\">" } else { "</tr>\n<tr>" };
        for (nth, cell) in row.iter().enumerate() {
            let _ = write!(html, "<td{}>{}</td>", class(nth), escaped(cell));
        }
        before = row.first();
    }
    html + "</tr></table></div>\n"
}

fn medians(rows: &[Row], subjects: &[&str]) -> String {
    let first = subjects.first().copied().unwrap_or_default();
    let by = format!("x {first}");
    let waits = ["p50", "p99", "p99.9", "max"].map(|name| summary::wait_header(rows, name));
    let [p50, p99, p999, max] = waits.each_ref().map(String::as_str);
    let header = [
        "load",
        "subject",
        "rounds",
        "IOPS",
        "MB/s",
        p50,
        p99,
        p999,
        max,
        &by,
        "client us/IO",
        "server us/IO",
        "stolen %",
        "unserved",
    ];
    let cells = |row: &Row| {
        let base = summary::find(rows, first, &row.load).map(|base| row.iops / base.iops);
        vec![
            row.load.label(),
            row.name(),
            row.rounds.to_string(),
            format!("{:.0}", row.iops),
            format!("{:.1}", row.bytes_s / 1e6),
            row.shown(|wait| wait.p50_us),
            row.shown(|wait| wait.p99_us),
            row.shown(|wait| wait.p999_us),
            row.shown(|wait| wait.max_us),
            shown(base, 2),
            shown(row.client_us_per_io, 1),
            shown(row.server_us_per_io, 1),
            shown(row.stolen.map(|part| part * 100.0), 1),
            format!("{:.0}", row.unserved),
        ]
    };
    let mut header = header.to_vec();
    let mut cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    if rows.iter().all(|row| row.load.rate.is_none()) {
        header.pop();
        cells.iter_mut().for_each(|row| drop(row.pop()));
    }
    html_table(&header, 2, &cells)
}

fn processes(results: &Results) -> String {
    let rows = summary::processes(results);
    "<p>Of the first round.</p>\n".to_owned() + &html_table(&summary::PROCESS_HEADER, 3, &rows)
}

/// The loads that differ in nothing but their depth, by what they have in common.
fn by_depth(rows: &[Row]) -> Vec<(String, Vec<Load>)> {
    let mut groups: Vec<(Load, Vec<Load>)> = Vec::new();
    for row in rows {
        let common = Load { depth: 0, ..row.load.clone() };
        match groups.iter_mut().find(|(other, _)| *other == common) {
            Some((_, loads)) if loads.contains(&row.load) => {}
            Some((_, loads)) => loads.push(row.load.clone()),
            None => groups.push((common, vec![row.load.clone()])),
        }
    }
    let named = |(common, mut loads): (Load, Vec<Load>)| {
        loads.sort_by_key(|load| load.depth);
        let jobs = if common.jobs > 1 { format!(", {} jobs", common.jobs) } else { String::new() };
        (common.pattern() + &jobs, loads)
    };
    groups.into_iter().map(named).collect()
}

fn against_depth(pattern: &str, loads: &[Load], rows: &[Row], subjects: &[&str]) -> String {
    let line = |value: &dyn Fn(&Row) -> Option<f64>, name: &str, dashed: bool| -> Vec<Series> {
        let of = |subject: &&str| {
            let points = loads.iter().filter_map(|load| {
                let row = summary::find(rows, subject, load)?;
                Some((f64::from(load.depth), value(row)?))
            });
            let (colour, name) = (colour(subjects, subject), format!("{subject}{name}"));
            Series { colour, name, dashed, faint: false, dots: true, points: points.collect() }
        };
        subjects.iter().map(of).filter(|series| !series.points.is_empty()).collect()
    };
    let ticks = loads.iter().map(|load| f64::from(load.depth)).collect();
    let x = Axis { label: "IOs in flight".into(), scale: Scale::Log2, ticks };
    let axis = |label: &str, scale| Axis { label: label.into(), scale, ticks: Vec::new() };
    let iops = lines(
        "IOPS against depth",
        &line(&|row| Some(row.iops), "", false),
        &x,
        &axis("IOs a second", Scale::Linear),
    );
    let mut figures = figure(&format!("{pattern}: IOs a second"), &iops);
    for direction in Direction::of(&loads[0]) {
        let mut latencies = line(&|row| Some(row.wait(*direction)?.p50_us), ", p50", false);
        latencies.extend(line(&|row| Some(row.wait(*direction)?.p99_us), ", p99", true));
        let latency = lines("latency against depth", &latencies, &x, &axis("latency, us", Scale::Log10));
        let caption = format!("{pattern}: latency, p50 solid, p99 dashed");
        figures += &figure(&of_direction(caption, &loads[0], *direction), &latency);
    }
    figures
}

fn bar_name(row: &Row, rows: &[Row]) -> String {
    let lone = rows.iter().all(|other| other.load == row.load);
    if lone { row.subject.clone() } else { format!("{}, {}", row.load.label(), row.subject) }
}

fn iops_bars(rows: &[Row], subjects: &[&str]) -> String {
    let bar = |row: &Row| Bar {
        name: bar_name(row, rows),
        parts: vec![(colour(subjects, &row.subject), row.iops)],
        text: short(row.iops),
    };
    bars("IOs a second", &rows.iter().map(bar).collect::<Vec<_>>())
}

fn cpu_bars(rows: &[Row], subjects: &[&str]) -> String {
    let bar = |row: &Row| {
        let (client, server) = (row.client_us_per_io.unwrap_or(0.0), row.server_us_per_io);
        let mut parts = vec![(usize::MAX, client)];
        parts.extend(server.map(|us| (colour(subjects, &row.subject), us)));
        let text = match server {
            Some(server) => format!("{client:.1} + {server:.1} us"),
            None => format!("{client:.1} us"),
        };
        Bar { name: bar_name(row, rows), parts, text }
    };
    bars("CPU for each IO", &rows.iter().map(bar).collect::<Vec<_>>())
}

/// The lines of all rounds under a load.
fn by_round(
    results: &Results,
    load: &Load,
    subjects: &[&str],
    points: impl Fn(&Run) -> Option<Vec<(f64, f64)>>,
) -> Vec<Series> {
    let runs = results.runs.iter().filter(|run| run.load == *load);
    let series = |run: &Run| {
        let (colour, name) =
            (colour(subjects, &run.subject), format!("{}, round {}", run.subject, run.round + 1));
        let faint = results.runs_of(&run.subject, load).count() > 1;
        let points = points(run)?;
        // A line of one point is a point.
        Some(Series { colour, name, dashed: false, faint, dots: points.len() < 3, points })
    };
    runs.filter_map(series).collect()
}

/// The wait that so many of all IOs stay under; the scale stretches the tail.
fn percentiles(results: &Results, load: &Load, direction: Direction, subjects: &[&str]) -> String {
    let series = by_round(results, load, subjects, |run| {
        let latency = run.latency(direction)?;
        // Beyond one in all IOs there is nothing to tell.
        let known = 1.0 - 1.0 / latency.ios.max(2) as f64;
        let curve = latency.curve.iter().filter(|(part, _)| *part <= known);
        Some(curve.map(|(part, us)| (*part, us.max(1.0))).collect())
    });
    let most = series.iter().flat_map(|one| &one.points).map(|(part, _)| *part).fold(0.99, f64::max);
    let nines = [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999].into_iter().filter(|part| *part <= most);
    let x =
        Axis { label: "part of all IOs that took less".into(), scale: Scale::Nines, ticks: nines.collect() };
    let y = Axis { label: "latency, us".into(), scale: Scale::Log10, ticks: Vec::new() };
    lines("latency by percentile", &series, &x, &y)
}

fn timeline(results: &Results, load: &Load, subjects: &[&str]) -> String {
    let series = by_round(results, load, subjects, |run| {
        let points: Vec<_> = run.timeline.iter().map(|moment| (moment.s, moment.iops)).collect();
        (!points.is_empty()).then_some(points)
    });
    let x = Axis { label: "time, s".into(), scale: Scale::Linear, ticks: Vec::new() };
    let y = Axis { label: "IOs a second".into(), scale: Scale::Linear, ticks: Vec::new() };
    lines("IOs a second over time", &series, &x, &y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn results() -> Results {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        Results::read(&path).expect("a fixture")
    }

    #[test]
    fn one_load_has_bars_and_several_depths_have_curves() {
        let mut results = results();
        let lone = page(&results);
        assert!(lone.contains("IOs a second</h2>") && !lone.contains("against depth"));
        let mut deeper = results.runs.clone();
        deeper.iter_mut().for_each(|run| run.load.depth = 128);
        results.runs.extend(deeper);
        let curves = page(&results);
        assert!(curves.contains("against depth</h2>") && curves.ends_with("</html>\n"));
        assert!(!curves.contains("NaN"));
    }

    #[test]
    fn a_mixed_load_has_plots_of_reads_and_of_writes() {
        let page = full();
        for (caption, count) in [("QD32: reads<", 1), ("QD32: writes<", 1), ("p99 dashed: writes<", 1)] {
            assert_eq!(page.matches(caption).count(), count, "{caption}");
        }
        let mut results = results();
        results.runs.iter_mut().for_each(|run| run.load.read_percent = 100);
        assert!(!super::page(&results).contains(": reads<"));
    }

    /// A page with curves, bars, percentiles and time lines of two subjects.
    fn full() -> String {
        let mut results = results();
        let mut deeper = results.runs.clone();
        deeper.iter_mut().for_each(|run| run.load.depth = 128);
        results.runs.extend(deeper);
        page(&results)
    }

    #[test]
    fn a_page_has_its_sections_in_order_and_needs_nothing_beside_it() {
        let page = full();
        let sections = [
            "Medians of the rounds",
            "IOs a second and latency against depth",
            "Latency by percentile",
            "Time line",
            "Processor time for each IO",
            "Processes",
            "Environment",
        ];
        let places: Vec<_> =
            sections.iter().map(|name| page.find(&format!("<h2>{name}")).expect(name)).collect();
        assert!(places.is_sorted(), "{places:?}");
        for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url(", "<img", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for query in ["prefers-color-scheme: dark", "@media print"] {
            assert!(page.contains(query), "{query}");
        }
    }

    #[test]
    fn every_tag_is_closed_and_every_plot_has_a_legend_axes_and_units() {
        let page = full();
        let body = &page[page.find("<h1>").expect("a heading")..page.rfind("</html>").expect("an end")];
        let mut open: Vec<&str> = Vec::new();
        for tag in body.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag ends");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "{open:?}"),
                // HTML lets these go unclosed; this page closes them nevertheless.
                None if tag.ends_with('/') => {}
                None => open.push(tag.split(' ').next().unwrap_or_default()),
            }
        }
        assert!(open.is_empty(), "{open:?}");
        let plots: Vec<&str> = page.split("<svg").skip(1).filter(|svg| svg.contains("<polyline")).collect();
        assert!(plots.len() >= 6, "{}", plots.len());
        for plot in plots {
            let svg = plot.split("</svg>").next().unwrap_or_default();
            assert_eq!(svg.matches("class=\"name\"").count(), 2, "both axes say what they are: {svg}");
            assert!(svg.contains("aria-label=") && svg.contains("class=\"grid\""), "{svg}");
        }
        for section in ["against depth", "by percentile", "Time line"] {
            let from = page.find(section).expect(section);
            let plots = page[from..].find("<svg").expect("a plot") + from;
            for subject in 0..2 {
                assert!(page[from..plots].contains(&format!("--s{subject})")), "no legend: {section}");
            }
        }
    }

    #[test]
    fn nothing_is_drawn_outside_of_its_picture() {
        let page = full();
        for svg in page.split("<svg").skip(1) {
            let svg = svg.split("</svg>").next().unwrap_or_default();
            let numbers = |text: &str| -> Vec<f64> {
                text.split([' ', ',']).filter_map(|word| word.parse().ok()).collect()
            };
            let attribute = |part: &str, name: &str| -> Vec<f64> {
                let value =
                    part.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
                value.map_or(Vec::new(), |(value, _)| numbers(value))
            };
            let view = attribute(svg, "viewBox");
            let (width, height) = (view[2], view[3]);
            for part in svg.split('<').skip(1) {
                let (x, y) = (attribute(part, "x"), attribute(part, "y"));
                assert!(x.iter().all(|x| (0.0..=width).contains(x)), "{part}");
                assert!(y.iter().all(|y| (0.0..=height).contains(y)), "{part}");
                let widths = attribute(part, "width");
                assert!(x.iter().zip(&widths).all(|(x, wide)| x + wide <= width), "{part}");
                for point in attribute(part, "points").chunks(2) {
                    let within = (0.0..=width).contains(&point[0]) && (0.0..=height).contains(&point[1]);
                    assert!(within, "{point:?} of {part}");
                }
                // A bar's name ends at its x, and what is behind it begins there.
                if let Some((tag, words)) = part.split_once('>').filter(|(tag, _)| tag.starts_with("text")) {
                    let wide = words.chars().count() as f64 * 7.5;
                    let x = x.first().copied().unwrap_or(width / 2.0);
                    let left_of = match tag {
                        end if end.contains("\"end\"") => wide,
                        middle if middle.contains("\"middle\"") => wide / 2.0,
                        _ => 0.0,
                    };
                    let (from, to) = (x - left_of, x - left_of + wide);
                    assert!(from >= -1.0 && to <= width + 1.0, "{words} from {from} to {to} of {width}");
                }
            }
        }
    }

    #[test]
    fn a_subjects_name_cannot_become_markup_anywhere() {
        let mut results = results();
        results.runs.iter_mut().for_each(|run| run.subject = "<script>".into());
        assert!(!page(&results).contains("<script>"));
    }
}
