//! Plots as SVG: lines over two axes, and bars. Colours are CSS variables of the page.

use std::fmt::Write;

/// Colours that the page defines: `--s0` and so on.
pub const COLOURS: usize = 6;

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 26.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 46.0;

/// One line.
#[derive(Clone, Debug)]
pub struct Series {
    /// Which colour.
    pub colour: usize,
    /// What its points say when pointed at.
    pub name: String,
    /// Told apart from another line of the same colour.
    pub dashed: bool,
    /// One of several like it, thinner and paler.
    pub faint: bool,
    /// Whether each point is marked.
    pub dots: bool,
    /// Where it goes; in the units of the axes.
    pub points: Vec<(f64, f64)>,
}

/// How a value is placed along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From zero.
    Linear,
    /// By powers of 2.
    Log2,
    /// By powers of 10.
    Log10,
    /// A part of all, stretched towards the whole: 0.9, 0.99, 0.999 lie evenly.
    Nines,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log2 => value.max(f64::MIN_POSITIVE).log2(),
            Self::Log10 => value.max(f64::MIN_POSITIVE).log10(),
            Self::Nines => -(1.0 - value.clamp(0.0, NINES_MAX)).log10(),
        }
    }
}

/// The last part of all that is told apart from the whole.
const NINES_MAX: f64 = 0.999_99;

/// One axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What and in which unit.
    pub label: String,
    /// How values are placed.
    pub scale: Scale,
    /// Values that are written at it; none: chosen by the data.
    pub ticks: Vec<f64>,
}

/// Escapes text for HTML and SVG.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number as people write it at an axis: 500, 20K, 1.5M.
pub fn short(value: f64) -> String {
    let trimmed = |value: f64, unit: &str| {
        let text = format!("{value:.1}");
        format!("{}{unit}", text.strip_suffix(".0").unwrap_or(&text))
    };
    match value.abs() {
        tiny if tiny > 0.0 && tiny < 0.001 => format!("{value}"),
        part if part < 10.0 && (value * 10.0).fract() != 0.0 => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        big if big >= 1e6 => trimmed(value / 1e6, "M"),
        some if some >= 1e3 => trimmed(value / 1e3, "K"),
        _ => trimmed(value, ""),
    }
}

fn label(scale: Scale, value: f64) -> String {
    if scale != Scale::Nines {
        return short(value);
    }
    let text = format!("{:.3}", value * 100.0);
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Five or so round values from zero on.
fn round_ticks(most: f64) -> Vec<f64> {
    let raw = most / 5.0;
    let power = 10_f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= raw);
    let step = step.unwrap_or(power * 10.0);
    (0..=6).map(|nth| f64::from(nth) * step).take_while(|tick| *tick <= most + step * 0.01).collect()
}

/// Powers, with their halves where there are few of them.
fn power_ticks(scale: Scale, low: f64, high: f64) -> Vec<f64> {
    let base: f64 = if scale == Scale::Log2 { 2.0 } else { 10.0 };
    let (from, to) = (low.floor() as i32, high.ceil() as i32);
    let fine = scale == Scale::Log10 && high - low <= 2.0;
    let factors: &[f64] = if fine { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let all = (from..=to).flat_map(|power| factors.iter().map(move |factor| factor * base.powi(power)));
    all.filter(|tick| (low - 1e-9..=high + 1e-9).contains(&scale.place(*tick))).collect()
}

/// Both ends of an axis in placed units, and its ticks.
fn fit(axis: &Axis, values: impl Iterator<Item = f64> + Clone) -> Option<(f64, f64, Vec<f64>)> {
    let placed = values.clone().chain(axis.ticks.iter().copied()).map(|value| axis.scale.place(value));
    let (low, high) = placed.fold((f64::MAX, f64::MIN), |(low, high), at| (low.min(at), high.max(at)));
    if !(low.is_finite() && high.is_finite() && low <= high) || values.count() == 0 {
        return None;
    }
    let given = || (!axis.ticks.is_empty()).then(|| axis.ticks.clone());
    Some(match axis.scale {
        Scale::Linear => {
            let most = if high > 0.0 { high } else { 1.0 };
            (0.0, most * 1.04, given().unwrap_or_else(|| round_ticks(most)))
        }
        Scale::Nines => (0.0, high.max(1.0), given().unwrap_or_default()),
        scale => {
            let margin = if high - low < 0.2 { 0.5 } else { (high - low) * 0.05 };
            let (low, high) = (low - margin, high + margin);
            (low, high, given().unwrap_or_else(|| power_ticks(scale, low, high)))
        }
    })
}

/// Lines over two axes.
pub fn lines(about: &str, series: &[Series], x: &Axis, y: &Axis) -> String {
    let all = || series.iter().flat_map(|one| &one.points);
    let (fit_x, fit_y) = (fit(x, all().map(|p| p.0)), fit(y, all().map(|p| p.1)));
    let (Some((x_low, x_high, x_ticks)), Some((y_low, y_high, y_ticks))) = (fit_x, fit_y) else {
        return "<p>Nothing to plot.</p>\n".into();
    };
    let across = |value: f64| {
        LEFT + (x.scale.place(value) - x_low) / (x_high - x_low).max(1e-9) * (WIDTH - LEFT - RIGHT)
    };
    let up = |value: f64| {
        HEIGHT
            - BOTTOM
            - (y.scale.place(value) - y_low) / (y_high - y_low).max(1e-9) * (HEIGHT - TOP - BOTTOM)
    };
    let mut svg =
        format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", escaped(about));
    for tick in &y_ticks {
        let at = up(*tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            label(y.scale, *tick)
        );
    }
    let base = HEIGHT - BOTTOM;
    for tick in &x_ticks {
        let at = across(*tick);
        let _ = write!(
            svg,
            "<line class=\"tick\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{base}\" y2=\"{}\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            base + 4.0,
            base + 17.0,
            label(x.scale, *tick)
        );
    }
    let _ = write!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{base}\" y2=\"{base}\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" class=\"name\">{}</text>\
         <text transform=\"translate(13 {}) rotate(-90)\" text-anchor=\"middle\" class=\"name\">{}</text>",
        WIDTH - RIGHT,
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0,
        escaped(&x.label),
        (TOP + base) / 2.0,
        escaped(&y.label)
    );
    for one in series {
        let places: Vec<String> =
            one.points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
        let kind = format!(
            "plot{}{}",
            if one.dashed { " dashed" } else { "" },
            if one.faint { " faint" } else { "" }
        );
        let colour = one.colour % COLOURS;
        let _ = write!(
            svg,
            "<polyline class=\"{kind}\" stroke=\"var(--s{colour})\" points=\"{}\"><title>{}</title></polyline>",
            places.join(" "),
            escaped(&one.name)
        );
        for (x, y) in one.points.iter().filter(|_| one.dots) {
            let _ = write!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"var(--s{colour})\"><title>{}: {} at {}</title></circle>",
                across(*x),
                up(*y),
                escaped(&one.name),
                short(*y),
                short(*x)
            );
        }
    }
    svg + "</svg>"
}

/// One bar, of one or more parts laid end to end.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Written before it.
    pub name: String,
    /// Each with its colour.
    pub parts: Vec<(usize, f64)>,
    /// Written behind it.
    pub text: String,
}

/// Width of a character beside a bar, at the size of the page's style on paper, where it is larger than on a screen.
const CHAR_WIDTH: f64 = 8.0;

/// Bars from zero on, one below the other.
pub fn bars(about: &str, bars: &[Bar]) -> String {
    const ROW: usize = 26;
    let sum = |bar: &Bar| bar.parts.iter().map(|(_, value)| value).sum::<f64>();
    let most = bars.iter().map(sum).fold(f64::MIN_POSITIVE, f64::max);
    let longest = |text: fn(&Bar) -> &String| {
        let most = bars.iter().map(|bar| text(bar).chars().count()).max().unwrap_or(0);
        most as f64 * CHAR_WIDTH + 14.0
    };
    let (names, texts) = (longest(|bar| &bar.name), longest(|bar| &bar.text));
    let (width, room) = (960.0, (960.0 - names - texts).max(100.0));
    let mut svg = format!(
        "<svg class=\"bars\" viewBox=\"0 0 {width} {}\" role=\"img\" aria-label=\"{}\">",
        bars.len() * ROW + 4,
        escaped(about)
    );
    for (row, bar) in bars.iter().enumerate() {
        let y = row * ROW + 4;
        let _ = write!(
            svg,
            "<text x=\"{:.0}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            names - 8.0,
            y + 14,
            escaped(&bar.name)
        );
        let mut x = names;
        for (colour, value) in &bar.parts {
            let width = value / most * room;
            let colour = if *colour == usize::MAX { "soft".into() } else { format!("s{}", colour % COLOURS) };
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"19\" fill=\"var(--{colour})\"/>"
            );
            x += width;
        }
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"{}\">{}</text>", x + 6.0, y + 14, escaped(&bar.text));
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: &[(f64, f64)]) -> Series {
        let (name, points) = ("a".to_owned(), points.to_vec());
        Series { colour: 0, name, dashed: false, faint: false, dots: true, points }
    }

    fn axis(scale: Scale) -> Axis {
        Axis { label: "x".into(), scale, ticks: Vec::new() }
    }

    #[test]
    fn a_plot_of_nothing_says_so() {
        for none in [vec![], vec![series(&[])]] {
            assert!(lines("p", &none, &axis(Scale::Linear), &axis(Scale::Log10)).contains("Nothing"));
        }
    }

    #[test]
    fn flat_lone_and_zero_values_are_placed_within_the_plot() {
        for scale in [Scale::Linear, Scale::Log2, Scale::Log10] {
            for points in [&[(1.0, 5.0), (2.0, 5.0)][..], &[(1.0, 1.0)], &[(1.0, 0.0), (2.0, 0.0)]] {
                let svg = lines("p", &[series(points)], &axis(scale), &axis(scale));
                assert!(svg.contains("<polyline"), "{svg}");
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{scale:?} {points:?} {svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_numbers_that_cover_the_data() {
        assert_eq!(round_ticks(73_000.0), [0.0, 20_000.0, 40_000.0, 60_000.0]);
        assert_eq!(round_ticks(1.2), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(power_ticks(Scale::Log2, -0.1, 7.2), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]);
        assert_eq!(power_ticks(Scale::Log10, 1.9, 3.1), [100.0, 200.0, 500.0, 1000.0]);
        let shown = [0.0, 0.25, 0.5, 2.5, 50.0, 1500.0, 20_000.0, 2_500_000.0].map(short);
        assert_eq!(shown, ["0", "0.25", "0.5", "2.5", "50", "1.5K", "20K", "2.5M"]);
        assert_eq!(label(Scale::Nines, 0.999), "99.9 %");
    }

    #[test]
    fn a_name_cannot_become_markup() {
        let bar = Bar { name: "<script>".into(), parts: vec![(0, 1.0)], text: "\"&".into() };
        let svg = bars("a\"b", &[bar]);
        assert!(
            !svg.contains("<script>") && svg.contains("&quot;&amp;") && svg.contains("a&quot;b"),
            "{svg}"
        );
    }
}
