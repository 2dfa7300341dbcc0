//! The ratios as a picture: one line for each row that stands beside a peer, on a logarithmic axis, with its spread and its
//! goal.

use std::fmt::Write;

use crate::report::{Goal, Report, Row};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 330.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 84.0;
const LINE: f64 = 26.0;
const TICKS: [f64; 13] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

const MET: &str = "#1a7f4b";
const MISSED: &str = "#c0392b";
const PLAIN: &str = "#2c5f9e";

/// From ratios to places.
struct Axis {
    least: f64,
    most: f64,
}

impl Axis {
    fn for_rows(rows: &[&Row]) -> Self {
        let goals = rows.iter().filter_map(|row| row.goal.map(Goal::bound));
        let ends = rows.iter().flat_map(|row| [row.judged().least(), row.judged().most()]);
        let (mut least, mut most) = (0.5, 2.0);
        for value in goals.chain(ends).filter(|value| value.is_finite() && *value > 0.0) {
            least = value.min(least);
            most = value.max(most);
        }
        Self { least: least / 1.15, most: most * 1.15 }
    }

    fn place(&self, ratio: f64) -> f64 {
        let share = (ratio.clamp(self.least, self.most) / self.least).ln() / (self.most / self.least).ln();
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }
}

fn text(svg: &mut String, x: f64, y: f64, attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // Writing to a string does not fail.
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{content}</text>");
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), attributes: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {attributes}/>");
}

/// Draws the rows that have a ratio.
pub(crate) fn draw(report: &Report) -> String {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.beside.is_some()).collect();
    let axis = Axis::for_rows(&rows);
    let bottom = TOP + LINE * rows.len() as f64;
    let height = bottom + 70.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"DejaVu Sans, sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, 16.0, 28.0, "font-size=\"18\" font-weight=\"bold\"", "Dray beside its peers: ratios, log scale");
    text(&mut svg, 16.0, 48.0, "font-size=\"11\" fill=\"#666\"", &report.about);
    for tick in TICKS.into_iter().filter(|tick| (axis.least..=axis.most).contains(tick)) {
        let x = axis.place(tick);
        let (color, width) = if tick == 1.0 { ("#888", 1.5) } else { ("#e2e2e2", 1.0) };
        line(&mut svg, (x, TOP - 8.0), (x, bottom), &format!("stroke=\"{color}\" stroke-width=\"{width}\""));
        text(&mut svg, x, TOP - 14.0, "text-anchor=\"middle\" font-size=\"11\" fill=\"#666\"", &format!("{tick}"));
    }
    for (number, row) in rows.iter().enumerate() {
        draw_row(&mut svg, &axis, row, TOP + LINE * (number as f64 + 0.5));
    }
    let y = bottom + 34.0;
    let legend = [(MET, "goal met"), (MISSED, "goal missed"), (PLAIN, "no goal")].into_iter().zip([16.0, 126.0, 256.0]);
    for ((color, name), x) in legend {
        let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{:.1}\" r=\"5\" fill=\"{color}\"/>", y - 4.0);
        text(&mut svg, x + 12.0, y, "font-size=\"12\"", name);
    }
    let note = "dot: median; bar: least to most; wedge: goal (pointing to the good side)";
    text(&mut svg, 350.0, y, "font-size=\"12\" fill=\"#666\"", note);
    svg.push_str("</svg>\n");
    svg
}

fn draw_row(svg: &mut String, axis: &Axis, row: &Row, y: f64) {
    let ratios = row.judged();
    let color = match row.is_met() {
        Some(true) => MET,
        Some(false) => MISSED,
        None => PLAIN,
    };
    let peer = row.beside.as_ref().map_or("", |beside| beside.name);
    text(svg, LEFT - 14.0, y + 4.5, "text-anchor=\"end\"", &format!("{} / {peer}", row.name));
    let whisker = format!("stroke=\"{color}\" stroke-width=\"4\" stroke-opacity=\"0.35\" stroke-linecap=\"round\"");
    line(svg, (axis.place(ratios.least()), y), (axis.place(ratios.most()), y), &whisker);
    if let Some(goal) = row.goal {
        let x = axis.place(goal.bound());
        let tip = if matches!(goal, Goal::AtLeast(_)) { 8.0 } else { -8.0 };
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {:.1} L{:.1} {y:.1} L{x:.1} {:.1} Z\" fill=\"none\" stroke=\"#333\"/>",
            y - 7.0,
            x + tip,
            y + 7.0
        );
    }
    let _ = writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{color}\"/>", axis.place(ratios.median()));
    let shown = format!("{:.2}", ratios.median());
    text(svg, WIDTH - RIGHT + 20.0, y + 4.5, &format!("fill=\"{color}\" font-weight=\"bold\""), &shown);
    if let Some(goal) = row.goal {
        let sign = if matches!(goal, Goal::AtLeast(_)) { "≥" } else { "≤" };
        let goal = format!("{sign} {:.2}", goal.bound());
        text(svg, WIDTH - RIGHT + 70.0, y + 4.5, "font-size=\"11\" fill=\"#666\"", &goal);
    }
}
