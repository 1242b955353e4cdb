//! A line of plain text: time, level, where, what, and the fields. It looks as `tracing-subscriber`'s own text does, at a
//! fraction of the cost: a gateway writes one for each request.

use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Most bytes of a usual line.
const USUAL: usize = 512;

/// The field that has no name in a line.
const MESSAGE: &str = "message";

/// The format.
pub(super) struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // Put together apart: each piece would take two calls through tables otherwise.
        let mut line = String::with_capacity(USUAL);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        push_time(&mut line, time.as_secs(), time.subsec_micros());
        line.push_str(match *event.metadata().level() {
            Level::ERROR => " ERROR ",
            Level::WARN => "  WARN ",
            Level::INFO => "  INFO ",
            Level::DEBUG => " DEBUG ",
            Level::TRACE => " TRACE ",
        });
        for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            line.push_str(span.name());
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>().filter(|fields| !fields.is_empty()) {
                write!(line, "{{{fields}}}")?;
            }
            line.push_str(": ");
        }
        line.push_str(event.metadata().target());
        line.push(':');
        let mut fields = Fields { line, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        fields.line.push('\n');
        out.write_str(&fields.line)
    }
}

/// Appends an instant as RFC 3339 has it, in UTC.
pub(super) fn push_time(line: &mut String, seconds: u64, micros: u32) {
    let (year, month, day) = date(seconds / 86_400);
    let of_day = (seconds % 86_400) as u32;
    push_digits(line, year, 4);
    for (before, value) in [('-', month), ('-', day), ('T', of_day / 3600), (':', of_day / 60 % 60), (':', of_day % 60)]
    {
        line.push(before);
        push_digits(line, value, 2);
    }
    line.push('.');
    push_digits(line, micros, 6);
    line.push('Z');
}

/// Appends a number of so many digits.
fn push_digits(line: &mut String, value: u32, digits: u32) {
    for at in (0..digits).rev() {
        line.push(char::from(b'0' + (value / 10u32.pow(at) % 10) as u8));
    }
}

/// The Gregorian date of a day since 1970: years begin in March, so that the odd day is their last, and come in eras of
/// 400, which are all alike.
fn date(days: u64) -> (u32, u32, u32) {
    const ERA: u64 = 146_097;
    /// From 1 March 0000 to 1 January 1970.
    const EPOCH: u64 = 719_468;
    let days = days + EPOCH;
    let (era, of_era) = (days / ERA, days % ERA);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    (year as u32, month as u32, day as u32)
}

/// Writes fields one after the other.
struct Fields {
    line: String,
    result: fmt::Result,
}

impl Fields {
    fn name(&mut self, field: &Field) {
        self.line.push(' ');
        if field.name() != MESSAGE {
            self.line.push_str(field.name());
            self.line.push('=');
        }
    }

    fn write(&mut self, what: fmt::Arguments<'_>) {
        self.result = self.result.and_then(|()| self.line.write_fmt(what));
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.name(field);
        // Nothing that a client sends may look like another field, or another line.
        if value.bytes().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\')) {
            let quote = if field.name() == MESSAGE { "" } else { "\"" };
            for part in [quote, value, quote] {
                self.line.push_str(part);
            }
        } else {
            self.write(format_args!("{value:?}"));
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.name(field);
        self.line.push_str(if value { "true" } else { "false" });
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.name(field);
        self.line.push_str(itoa::Buffer::new().format(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.name(field);
        self.line.push_str(itoa::Buffer::new().format(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.name(field);
        // Elsewhere it is written with an exponent, or is no number.
        if (1e-4..1e16).contains(&value) {
            self.line.push_str(zmij::Buffer::new().format_finite(value));
        } else {
            self.write(format_args!("{value:?}"));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_debug(field, &format_args!("{value}"));
        let below: Vec<String> =
            std::iter::successors(value.source(), |error| error.source()).map(|error| error.to_string()).collect();
        if !below.is_empty() {
            self.write(format_args!(" {}.sources={below:?}", field.name()));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.name(field);
        let from = self.line.len();
        self.write(format_args!("{value:?}"));
        // What prints itself may print anything; a line stays one.
        if self.line.as_bytes()[from..].iter().any(u8::is_ascii_control) {
            let said = self.line.split_off(from);
            for character in said.chars() {
                match character.is_ascii_control() {
                    true => self.line.extend(character.escape_default()),
                    false => self.line.push(character),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let text = |seconds: u64, micros: u32| {
            let mut line = String::new();
            push_time(&mut line, seconds, micros);
            line
        };
        assert_eq!(text(0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(text(951_782_399, 999_999), "2000-02-28T23:59:59.999999Z");
        assert_eq!(text(951_868_799, 5), "2000-02-29T23:59:59.000005Z");
        assert_eq!(text(4_107_542_400, 0), "2100-03-01T00:00:00.000000Z");
        // Every day of some centuries follows the one before.
        let mut last = date(0);
        for day in 1..200_000 {
            let next = date(day);
            let (year, month, of_month) = last;
            let following = [(year, month, of_month + 1), (year, month + 1, 1), (year + 1, 1, 1)];
            assert!(following.contains(&next), "{last:?} {next:?}");
            last = next;
        }
        assert_eq!(date(199_999), (2517, 7, 31));
    }

    /// Remembers what is written.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn maker(&self) -> impl Fn() -> Sink + Send + Sync + 'static {
            let sink = self.clone();
            move || sink.clone()
        }

        /// Returns the lines without their times.
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(|line| line.split_once('Z').unwrap().1.to_string()).collect()
        }
    }

    fn say() {
        let error = std::io::Error::other(std::fmt::Error);
        let error: &(dyn std::error::Error + 'static) = &error;
        let nothing: Option<&str> = None;
        tracing::info!(text = "a \"b\" \\ é\nnext", seconds = 0.25, none = nothing, some = Some(3), yes = true, "said");
        tracing::error!(error, negative = -3i64, shown = %"x y", debugged = ?Some("q"), "failed: {}", 7);
        let span = tracing::warn_span!("outer", id = 5);
        span.in_scope(|| tracing::warn!(r#type = "t", big = u64::MAX, tiny = 1e-9));
        tracing::debug!("plain");
        for decade in -7..20 {
            let around = 10f64.powi(decade);
            let (below, above) = (around.next_down(), around.next_up());
            tracing::info!(around, below, above, third = around / 3.0, negative = -around);
        }
        tracing::info!(zero = 0.0, none = f64::NAN, least = i64::MIN, small = 1u8);
        tracing::trace!(target: "elsewhere", whole = 1.0, "traced");
    }

    #[test]
    fn lines_look_as_those_of_the_library() {
        let (ours, theirs) = (Sink::default(), Sink::default());
        let builder = || tracing_subscriber::fmt().with_max_level(Level::TRACE).with_ansi(false);
        let plain = builder().with_writer(ours.maker()).event_format(Plain).finish();
        tracing::subscriber::with_default(plain, say);
        tracing::subscriber::with_default(builder().with_writer(theirs.maker()).finish(), say);
        assert_eq!(ours.lines(), theirs.lines());
        assert_eq!(ours.lines().len(), 33);
    }

    #[test]
    fn what_a_client_says_stays_in_its_line() {
        let sink = Sink::default();
        let plain = tracing_subscriber::fmt().with_writer(sink.maker()).event_format(Plain).finish();
        tracing::subscriber::with_default(plain, || tracing::info!(shown = %"a\nb\u{1b}[31m", "c\nd"));
        assert_eq!(sink.lines(), [r"  INFO service::telemetry::plain::tests: c\nd shown=a\nb\u{1b}[31m"]);
    }
}
