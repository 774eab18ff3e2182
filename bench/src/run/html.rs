//! The report as one HTML page: no script, no font, no file beside it; plots are SVG in the page.
//!
//! Colours are told by CSS variables, so that the page reads in a dark room and on paper.

use super::result::{Results, Run};
use crate::report::median;
use std::fmt::Write;

const STYLE: &str = "
:root { --ink:#1d2330; --soft:#5d6678; --line:#d9dde5; --paper:#fff; --s0:#1f6feb; --s1:#d1495b; --s2:#2a8f5c; --s3:#8a5cd1; --s4:#c27c0e; --s5:#0e8a99; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e8f0; --soft:#98a2b5; --line:#343c4a; --paper:#14181f; --s0:#6ea8fe; --s1:#f28b97; --s2:#6fcf9b; --s3:#b99bf0; --s4:#e6b25c; --s5:#5cc8d6; } }
@media print { :root { --ink:#000; --soft:#444; --line:#bbb; --paper:#fff; } figure { break-inside: avoid; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, li, figcaption { color: var(--soft); } figure { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--line); } .plot { fill: none; stroke-width: 2; }
.wide { overflow-x: auto; }";

/// The page.
pub fn page(results: &Results) -> String {
    let subjects = results.subjects();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>ashlar bench</title><style>{STYLE}</style>\n<h1>ashlar bench</h1>\n<p>{}</p>\n<p>{}</p>\n",
        escaped(&results.environment.line()),
        escaped(&workload(results))
    );
    page += "<h2>Medians of the rounds</h2>\n";
    page += &summary(results);
    page += "<h2>IOs a second</h2>\n";
    page += &bars(&subjects, |name| middle(results, name, |run| Some(run.iops)), "IOPS", 0);
    page += "<h2>Latency by percentile</h2>\n";
    page += &percentiles(results, &subjects);
    page += "<h2>Time line</h2>\n";
    page += &timeline(results, &subjects);
    if results.runs.iter().any(|run| run.server_cpu_us_per_io().is_some()) {
        page += "<h2>Server CPU for each IO</h2>\n";
        page += &bars(&subjects, |name| middle(results, name, Run::server_cpu_us_per_io), "us", 1);
        page += &processes(results);
    }
    page += "<h2>Environment</h2>\n<ul>";
    let tuning = results.tuning.iter().map(|line| format!("not tuned: {line}"));
    let revision = (!results.revision.is_empty()).then(|| format!("source {}", results.revision));
    for line in results.disk.iter().cloned().chain(revision).chain(tuning) {
        let _ = write!(page, "<li>{}</li>", escaped(&line));
    }
    page + "</ul>\n</html>\n"
}

fn workload(results: &Results) -> String {
    let load = &results.load;
    let sizes: Vec<String> =
        load.sizes.0.iter().map(|(bytes, share)| format!("{}K:{share}", bytes >> 10)).collect();
    let kind = load.rate.map_or(format!("closed loop, depth {}", load.depth), |rate| {
        format!("open loop, {rate:.0} IOPS arrive")
    });
    format!(
        "{:?}, {} % reads, {} of {} MiB, {kind}, {} job(s); {} s a measurement after {} s of warm-up.",
        load.order,
        load.read_percent,
        sizes.join(", "),
        load.bytes >> 20,
        load.jobs,
        results.seconds,
        results.warm_up
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn middle(results: &Results, name: &str, value: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = results.runs_of(name).filter_map(value).collect();
    (!values.is_empty()).then(|| median(values))
}

fn summary(results: &Results) -> String {
    let mut text = String::from(
        "<div class=\"wide\"><table><tr><th>subject</th><th>rounds</th><th>IOPS</th><th>MB/s</th><th>p50 us</th><th>p99 us</th><th>p99.9 us</th><th>max us</th><th>unserved</th></tr>",
    );
    for name in results.subjects() {
        let of = |value: &dyn Fn(&Run) -> Option<f64>, digits: usize| {
            middle(results, name, value).map_or("-".into(), |value| format!("{value:.digits$}"))
        };
        let cells = [
            of(&|run| Some(run.iops), 0),
            of(&|run| Some(run.bytes_s / 1e6), 1),
            of(&|run| run.main_latency().map(|l| l.p50_us), 0),
            of(&|run| run.main_latency().map(|l| l.p99_us), 0),
            of(&|run| run.main_latency().map(|l| l.p999_us), 0),
            of(&|run| run.main_latency().map(|l| l.max_us), 0),
            of(&|run| Some(run.unserved as f64), 0),
        ];
        let rounds = results.runs_of(name).count();
        let _ = write!(
            text,
            "<tr><td>{}</td><td>{rounds}</td><td>{}</td></tr>",
            escaped(name),
            cells.join("</td><td>")
        );
    }
    text + "</table></div>\n"
}

fn processes(results: &Results) -> String {
    let mut text = String::from(
        "<div class=\"wide\"><table><tr><th>subject</th><th>process</th><th>CPU s</th><th>us/IO</th><th>MiB</th><th>switches</th></tr>",
    );
    for run in results.runs.iter().filter(|run| run.round == 0) {
        for one in &run.processes {
            let _ = write!(
                text,
                "<tr><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.1}</td><td>{}</td><td>{}</td></tr>",
                escaped(&run.subject),
                escaped(&one.name),
                one.cpu_s,
                one.cpu_us_per_io,
                one.rss_bytes >> 20,
                one.switches
            );
        }
    }
    text + "</table></div>\n"
}

/// A bar a subject.
fn bars(subjects: &[&str], value: impl Fn(&str) -> Option<f64>, unit: &str, digits: usize) -> String {
    let values: Vec<(usize, &str, f64)> =
        subjects.iter().enumerate().filter_map(|(nth, name)| Some((nth, *name, value(name)?))).collect();
    let most = values.iter().map(|(.., value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let mut svg = format!("<figure><svg viewBox=\"0 0 800 {}\" role=\"img\">", values.len() * 34 + 6);
    for (row, (nth, name, value)) in values.iter().enumerate() {
        let (y, width) = (row * 34 + 4, value / most * 520.0);
        let _ = write!(
            svg,
            "<text x=\"150\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"160\" y=\"{y}\" width=\"{width:.1}\" height=\"24\" fill=\"var(--s{})\"/><text x=\"{:.1}\" y=\"{}\">{value:.digits$} {unit}</text>",
            y + 16,
            escaped(name),
            nth % 6,
            168.0 + width,
            y + 16
        );
    }
    svg + "</svg></figure>\n"
}

/// One line of a plot: which colour, its name, its points.
type Curve = (usize, String, Vec<(f64, f64)>);

/// The wait that so many of all IOs stay under, by round; the scale stretches the tail.
fn percentiles(results: &Results, subjects: &[&str]) -> String {
    let x = |part: f64| -(1.0 - part.min(0.99999)).log10();
    let curve = |run: &Run| {
        let nth = subjects.iter().position(|name| *name == run.subject)?;
        let points =
            run.main_latency()?.curve.iter().map(|(part, us)| (x(*part), us.max(1.0).log10())).collect();
        Some((nth, run.subject.clone(), points))
    };
    let curves: Vec<Curve> = results.runs.iter().filter_map(curve).collect();
    let x_ticks =
        [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999].map(|part| (x(part), format!("{} %", part * 100.0)));
    let y_ticks = (0..8).map(|power| (f64::from(power), format!("{} us", 10_u64.pow(power as u32))));
    plot(&curves, &x_ticks, &y_ticks.collect::<Vec<_>>(), false)
}

fn timeline(results: &Results, subjects: &[&str]) -> String {
    let curve = |run: &Run| {
        let nth = subjects.iter().position(|name| *name == run.subject)?;
        Some((nth, run.subject.clone(), run.timeline.iter().map(|moment| (moment.s, moment.iops)).collect()))
    };
    let curves: Vec<Curve> = results.runs.iter().filter_map(curve).collect();
    let most = curves.iter().flat_map(|(.., points)| points).map(|(_, iops)| *iops).fold(1.0, f64::max);
    let step = 10_f64.powf((most / 2.0).log10().floor());
    let y_ticks: Vec<_> = (0..=20)
        .map(|nth| f64::from(nth) * step)
        .take_while(|y| *y <= most * 1.1)
        .map(|y| (y, format!("{y:.0}")))
        .collect();
    let x_ticks: Vec<_> =
        (0..=5).map(|nth| results.seconds * f64::from(nth) / 5.0).map(|s| (s, format!("{s:.1} s"))).collect();
    plot(&curves, &x_ticks, &y_ticks, true)
}

fn plot(curves: &[Curve], x_ticks: &[(f64, String)], y_ticks: &[(f64, String)], from_zero: bool) -> String {
    let all = || curves.iter().flat_map(|(.., points)| points);
    let bound =
        |of: fn(&(f64, f64)) -> f64, start: f64, pick: fn(f64, f64) -> f64| all().map(of).fold(start, pick);
    let right = x_ticks.iter().map(|(x, _)| *x).fold(bound(|p| p.0, f64::MIN, f64::max), f64::max);
    let (low, high) = (bound(|p| p.1, f64::MAX, f64::min), bound(|p| p.1, f64::MIN, f64::max));
    if !(right > 0.0 && high.is_finite() && low <= high) {
        return "<p>Too short for a plot.</p>\n".into();
    }
    let bottom = if from_zero { 0.0 } else { low.floor() };
    let top = if from_zero { high * 1.05 } else { high.ceil().max(bottom + 1.0) };
    let at = |(x, y): &(f64, f64)| (80.0 + x / right * 690.0, 290.0 - (y - bottom) / (top - bottom) * 270.0);
    let mut svg = String::from("<figure><svg viewBox=\"0 0 800 330\" role=\"img\">");
    for (y, label) in y_ticks.iter().filter(|(y, _)| (bottom..=top).contains(y)) {
        let (_, y) = at(&(0.0, *y));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"80\" x2=\"770\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"74\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            y + 4.0
        );
    }
    for (x, label) in x_ticks {
        let (x, _) = at(&(*x, bottom));
        let _ = write!(svg, "<text x=\"{x:.1}\" y=\"308\" text-anchor=\"middle\">{label}</text>");
    }
    for (nth, _, points) in curves {
        let places: Vec<String> = points.iter().map(at).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = write!(
            svg,
            "<polyline class=\"plot\" stroke=\"var(--s{})\" points=\"{}\"/>",
            nth % 6,
            places.join(" ")
        );
    }
    let mut named: Vec<(usize, &str)> = curves.iter().map(|(nth, name, _)| (*nth, name.as_str())).collect();
    named.sort_unstable();
    named.dedup();
    for (row, (nth, name)) in named.iter().enumerate() {
        let x = 90 + row * 130;
        let _ = write!(
            svg,
            "<rect x=\"{x}\" y=\"4\" width=\"12\" height=\"12\" fill=\"var(--s{})\"/><text x=\"{}\" y=\"14\">{}</text>",
            nth % 6,
            x + 18,
            escaped(name)
        );
    }
    svg + "</svg><figcaption>One line for each round.</figcaption></figure>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subjects_name_cannot_become_markup() {
        assert_eq!(escaped("<b>&"), "&lt;b&gt;&amp;");
        let svg = bars(&["<script>"], |_| Some(1.0), "us", 1);
        assert!(!svg.contains("<script>") && svg.contains("1.0 us"), "{svg}");
    }

    #[test]
    fn a_plot_of_nothing_says_so() {
        assert!(plot(&[], &[], &[], true).contains("Too short"));
        let flat = vec![(0, "a".to_owned(), vec![(0.0, 5.0), (1.0, 5.0)])];
        let svg = plot(&flat, &[(1.0, "1 s".into())], &[(0.0, "0".into())], true);
        assert!(svg.contains("<polyline") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
