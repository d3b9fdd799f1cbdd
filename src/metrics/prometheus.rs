//! The text format of Prometheus (exposition format 0.0.4), written line by line. It knows no metric.

use std::fmt::{Display, Write};
use std::time::Duration;

use super::histogram::Histogram;

/// Metrics as text, each with its help and its kind.
#[derive(Debug)]
pub(crate) struct Text {
    prefix: &'static str,
    text: String,
}

impl Text {
    /// No metric yet; each one's name begins with `prefix`.
    pub(crate) fn new(prefix: &'static str) -> Self {
        Self { prefix, text: String::new() }
    }

    /// One metric: its kind (`counter`, `gauge`, `summary`), and a line for each label or suffix with its value.
    pub(crate) fn put<V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        lines: impl IntoIterator<Item = (String, V)>,
    ) {
        let prefix = self.prefix;
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}");
        for (labels, value) in lines {
            let _ = writeln!(self.text, "{prefix}{name}{labels} {value}");
        }
    }

    /// A metric of one value.
    pub(crate) fn put_one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.put(name, kind, help, [(String::new(), value)]);
    }

    /// Metrics of one kind and of one value each: name, help, value.
    pub(crate) fn put_all<'n, V: Display>(
        &mut self,
        kind: &str,
        metrics: impl IntoIterator<Item = (&'n str, &'n str, V)>,
    ) {
        for (name, help, value) in metrics {
            self.put_one(name, kind, help, value);
        }
    }

    /// All of it.
    pub(crate) fn finish(self) -> String {
        self.text
    }
}

/// The label of a route.
pub(crate) fn route(route: impl Display) -> String {
    format!("{{route=\"{route}\"}}")
}

/// The lines of a summary of one route's times: quantiles, sum and count. None where there is none.
pub(crate) fn summary(route: impl Display, times: &Histogram) -> Vec<(String, String)> {
    let seconds = |time: Duration| time.as_secs_f64().to_string();
    let mut lines = Vec::new();
    for share in [0.5, 0.99] {
        if let Some(time) = times.quantile(share) {
            lines.push((format!("{{route=\"{route}\",quantile=\"{share}\"}}"), seconds(time)));
        }
    }
    if times.count() > 0 {
        lines.push((format!("_sum{{route=\"{route}\"}}"), seconds(times.sum())));
        lines.push((format!("_count{{route=\"{route}\"}}"), times.count().to_string()));
    }
    lines
}
