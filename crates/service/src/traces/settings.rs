//! What the environment says of traces: OpenTelemetry's own variables.

use std::time::Duration;

/// Whether and how spans are exported; off by default. Endpoint, headers, sampler and resource are read by
/// OpenTelemetry's own code, which knows their grammar; what it would silently make a default of is refused here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSettings {
    /// Whether there are any.
    pub enabled: bool,
    /// Whether the collector wants TLS.
    pub tls: bool,
    /// Whether the environment names the service.
    pub named: bool,
    /// Spans that wait to be exported; further ones are dropped.
    pub queue: usize,
    /// Most spans of one export.
    pub batch: usize,
    /// Longest wait for a batch to fill.
    pub delay: Duration,
    /// Longest time of one export.
    pub timeout: Duration,
}

/// A variable that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{variable}: '{value}' {problem}")]
pub struct TraceVariable {
    variable: &'static str,
    value: String,
    problem: &'static str,
}

impl Default for TraceSettings {
    /// Off; the sizes and times are OpenTelemetry's own defaults.
    fn default() -> Self {
        TraceSettings {
            enabled: false,
            tls: false,
            named: false,
            queue: 2048,
            batch: 512,
            delay: Duration::from_secs(5),
            timeout: Duration::from_secs(10),
        }
    }
}

/// Most spans that may wait: some 100 MB.
const QUEUE_MAX: u64 = 1 << 16;
/// Longest time that can be set, in milliseconds: a minute.
const TIME_MAX_MS: u64 = 60_000;

const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

impl TraceSettings {
    /// Reads the variables. Spans are exported once an endpoint is named, or the exporter `otlp`.
    ///
    /// # Errors
    /// A variable of a wanted export that has a value which can't be used.
    pub fn from_variables(read: impl Fn(&str) -> Option<String>) -> Result<Self, TraceVariable> {
        let set = |name: &str| read(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let endpoint = set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| set("OTEL_EXPORTER_OTLP_ENDPOINT"));
        let exporter = set("OTEL_TRACES_EXPORTER");
        let disabled = set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let wanted = match exporter.as_deref() {
            Some("none") => false,
            Some("otlp") => true,
            Some(other) if endpoint.is_some() => {
                return Err(refuse("OTEL_TRACES_EXPORTER", other, "is not served; 'otlp' and 'none' are"));
            }
            _ => endpoint.is_some(),
        };
        let defaults = TraceSettings::default();
        if disabled || !wanted {
            return Ok(defaults);
        }
        let tls = match endpoint.as_deref() {
            None => false,
            Some(url) if url.starts_with("http://") => false,
            Some(url) if url.starts_with("https://") => true,
            Some(url) => return Err(refuse("OTEL_EXPORTER_OTLP_ENDPOINT", url, "is no http:// or https:// URL")),
        };
        for name in ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"] {
            if let Some(protocol) = set(name).filter(|protocol| protocol != "http/protobuf") {
                return Err(refuse(name, &protocol, "is not served; 'http/protobuf' is, on port 4318 by custom"));
            }
        }
        for name in ["OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"] {
            if let Some(compression) = set(name).filter(|compression| compression != "none") {
                return Err(refuse(name, &compression, "is not served; leave it out"));
            }
        }
        let sampler = set("OTEL_TRACES_SAMPLER");
        if let Some(sampler) = sampler.as_deref().filter(|sampler| !SAMPLERS.contains(sampler)) {
            return Err(refuse("OTEL_TRACES_SAMPLER", sampler, "is no sampler that is known here"));
        }
        if sampler.is_some_and(|sampler| sampler.ends_with("traceidratio")) {
            let ratio = set("OTEL_TRACES_SAMPLER_ARG").unwrap_or_default();
            if !ratio.parse::<f64>().is_ok_and(|ratio| (0.0..=1.0).contains(&ratio)) {
                return Err(refuse("OTEL_TRACES_SAMPLER_ARG", &ratio, "is no share from 0 to 1"));
            }
        }
        let number = |name: &'static str, default: u64, max: u64| match set(name) {
            None => Ok(default),
            Some(text) => {
                let number = text.parse::<u64>().ok().filter(|number| (1..=max).contains(number));
                number.ok_or_else(|| refuse(name, &text, "is no whole number in its range"))
            }
        };
        let time =
            |name, default: Duration| Ok(Duration::from_millis(number(name, default.as_millis() as u64, TIME_MAX_MS)?));
        let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", defaults.queue as u64, QUEUE_MAX)? as usize;
        let batch = number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", defaults.batch as u64, QUEUE_MAX)? as usize;
        let general = time("OTEL_EXPORTER_OTLP_TIMEOUT", defaults.timeout)?;
        Ok(TraceSettings {
            enabled: true,
            tls,
            named: set("OTEL_SERVICE_NAME").is_some()
                || set("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| attributes.contains("service.name=")),
            queue,
            batch: batch.min(queue),
            delay: time("OTEL_BSP_SCHEDULE_DELAY", defaults.delay)?,
            timeout: time("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", general)?,
        })
    }
}

fn refuse(variable: &'static str, value: &str, problem: &'static str) -> TraceVariable {
    TraceVariable { variable, value: value.into(), problem }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<TraceSettings, String> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
        TraceSettings::from_variables(find).map_err(|error| error.to_string())
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");

    #[test]
    fn traces_are_off_until_somebody_names_where_they_go() {
        assert_eq!(read(&[]), Ok(TraceSettings::default()));
        assert!(read(&[ENDPOINT]).unwrap().enabled);
        assert!(read(&[("OTEL_TRACES_EXPORTER", "otlp")]).unwrap().enabled);
        for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "TRUE")] {
            assert!(!read(&[ENDPOINT, off]).unwrap().enabled, "{off:?}");
        }
        let nonsense = ("OTEL_TRACES_SAMPLER", "sometimes");
        assert!(!read(&[nonsense]).unwrap().enabled, "what is not wanted is not judged");
    }

    #[test]
    fn sizes_and_times_are_read_and_bounded() {
        let settings = read(&[
            ENDPOINT,
            ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=b,service.name=mine"),
        ]);
        let settings = settings.unwrap();
        assert_eq!((settings.queue, settings.batch), (16, 16), "a batch is not larger than the queue");
        assert_eq!((settings.delay, settings.timeout), (Duration::from_millis(100), Duration::from_secs(2)));
        assert!(settings.named && !settings.tls);
        assert!(read(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://x/v1/traces")]).unwrap().tls);
    }

    #[test]
    fn a_value_that_would_silently_become_a_default_is_refused_and_named() {
        for bad in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "99999999"),
            ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ] {
            let error = read(&[ENDPOINT, bad]).unwrap_err();
            assert!(error.contains(bad.0) && error.contains(bad.1), "{error}");
        }
        assert!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")]).unwrap_err().contains("collector:4318"));
        let ratio = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
        assert!(read(&[ENDPOINT, ratio]).is_err());
        assert!(read(&[ENDPOINT, ratio, ("OTEL_TRACES_SAMPLER_ARG", "0.25")]).is_ok());
    }
}
