//! `${NAME}` in what operators write: names known at the event, an error for every other, no second round.

/// Longest name.
const NAME_BYTES_MAX: usize = 64;

/// Why a text can't be expanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExpandError {
    /// A name that means nothing here.
    Unknown(String),
    /// `${` without its `}`, or with something that is no name in between; the byte it begins at.
    Malformed(usize),
}

impl std::fmt::Display for ExpandError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExpandError::Unknown(name) => write!(f, "'${{{name}}}' means nothing here"),
            ExpandError::Malformed(at) => {
                write!(f, "'${{' at byte {at} begins no '${{NAME}}'; write '$${{' for the characters themselves")
            }
        }
    }
}

impl std::error::Error for ExpandError {}

/// Returns `text` with each `${NAME}` replaced by what `lookup` knows of it. `$${` gives `${`; every other `$` stays.
/// What is put in is not looked at again.
///
/// # Errors
/// [`ExpandError`].
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, ExpandError> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let start = text.len() - rest.len() + at;
        let (before, macro_on) = rest.split_at(at);
        if let Some(escaped) = before.strip_suffix('$') {
            out.push_str(escaped);
            out.push_str("${");
            rest = &macro_on[2..];
            continue;
        }
        out.push_str(before);
        let name_on = &macro_on[2..];
        let end = name_on.bytes().take(NAME_BYTES_MAX + 1).position(|byte| byte == b'}');
        let name = end.map(|end| &name_on[..end]).filter(|name| is_name(name)).ok_or(ExpandError::Malformed(start))?;
        out.push_str(&lookup(name).ok_or_else(|| ExpandError::Unknown(name.to_string()))?);
        rest = &name_on[name.len() + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// Whether a macro may have this name.
pub fn is_macro_name(name: &str) -> bool {
    is_name(name) && name.len() <= NAME_BYTES_MAX
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn known(name: &str) -> Option<String> {
        match name {
            "PORT" => Some("8080".into()),
            "SELF" => Some("${PORT}".into()),
            _ => None,
        }
    }

    #[test]
    fn names_are_replaced_once_and_dollars_stay() {
        assert_eq!(expand("http://h:${PORT}/x?a=$1", known).unwrap(), "http://h:8080/x?a=$1");
        assert_eq!(expand("${SELF}", known).unwrap(), "${PORT}");
        assert_eq!(expand("$${PORT} $$ ${PORT}", known).unwrap(), "${PORT} $$ 8080");
        assert_eq!(expand("${OTHER}", known), Err(ExpandError::Unknown("OTHER".into())));
        for wrong in ["a${", "a${PORT", "a${}", "a${A B}"] {
            assert_eq!(expand(wrong, known), Err(ExpandError::Malformed(1)), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_expands_or_is_refused_and_text_without_macros_is_unchanged(text in "[a$ {}PORTé]{0,40}") {
            let result = expand(&text, known);
            if !text.contains("${") {
                prop_assert_eq!(result.unwrap(), text);
            }
        }
    }
}
