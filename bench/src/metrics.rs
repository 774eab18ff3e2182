//! Prometheus text of a target, read as a scraper reads it.

use anyhow::{Context, ensure};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Fetches `/metrics`; the address may carry a scheme and a path.
///
/// # Errors
/// Nothing answers there, or not with 200.
pub fn fetch(address: &str) -> anyhow::Result<String> {
    let address = address.trim_start_matches("http://");
    let (host, path) = address.split_once('/').unwrap_or((address, "metrics"));
    let mut stream = TcpStream::connect(host).with_context(|| format!("no metrics at {host}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{host}/{path}: {head}");
    Ok(body.to_owned())
}

/// The sum of all samples whose name contains `part`, over labels and names.
pub fn sum(text: &str, part: &str) -> f64 {
    let value = |line: &str| {
        let name = line.split(['{', ' ']).next()?;
        if line.starts_with('#') || !name.contains(part) {
            return None;
        }
        let rest = line.rsplit_once('}').map_or(&line[name.len()..], |(_, rest)| rest);
        rest.split_whitespace().next()?.parse::<f64>().ok()
    };
    text.lines().filter_map(value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_labels_but_not_over_comments() {
        let text = "# HELP a_corrupt_total 7\na_corrupt_total{shard=\"0\",x=\"} 9\"} 2 1700\na_corrupt_total{shard=\"1\"} 3\nb 8\n";
        assert_eq!(sum(text, "corrupt"), 5.0);
        assert_eq!(sum(text, "b"), 8.0);
        assert_eq!(sum(text, "none"), 0.0);
    }
}
