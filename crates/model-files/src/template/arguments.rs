//! In which form a template takes the arguments of a call: as an object, or as its text.

use serde_json::{Map, Value as Json, json};

use super::ChatTemplate;

/// Most templates print an object by `tojson`, as transformers gives it to them; some join a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Arguments {
    #[default]
    Object,
    Text,
}

/// A key that no template has.
const PROBE: &str = "cortex_probe";

impl Arguments {
    /// Finds the form by two renderings of a call: the object has to come out, and not as Python prints it.
    pub(super) fn wanted_by(template: &ChatTemplate) -> Self {
        let comes_out = |form: Self| {
            let call = json!({"role": "assistant", "content": "", "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {PROBE: "x"}}},
            ]});
            let context = json!({
                "messages": [{"role": "user", "content": "x"}, form.fit(&call)],
                "bos_token": "", "eos_token": "", "add_generation_prompt": false, "tools": null,
            });
            let rendered = context.as_object().and_then(|context: &Map<_, _>| template.render(context, 0).ok());
            rendered.is_some_and(|text| text.contains(PROBE) && !text.contains(&format!("'{PROBE}'")))
        };
        if !comes_out(Arguments::Object) && comes_out(Arguments::Text) { Arguments::Text } else { Arguments::Object }
    }

    /// Returns a message in this form. Arguments that are no object stay the text that they are.
    pub(super) fn fit(self, message: &Json) -> Json {
        let mut message = message.clone();
        let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut);
        for call in calls.into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            let object = match (self, &*arguments) {
                (Arguments::Object, Json::String(text)) => serde_json::from_str::<Map<_, _>>(text).ok().map(Json::from),
                (Arguments::Text, Json::Object(_)) => Some(arguments.to_string().into()),
                _ => None,
            };
            if let Some(object) = object {
                *arguments = object;
            }
        }
        message
    }
}
