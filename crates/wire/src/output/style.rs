//! In which form a model reasons and calls tools, by its chat template or by its operator's word.

use super::tagged::Tags;

/// The form of a model's tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolStyle {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, once for each call: Qwen, Hermes.
    Hermes,
    /// `{"name": .., "parameters": {..}}` from the start, or after `<|python_tag|>`; more calls after `;`: Llama 3.
    Llama,
    /// `[TOOL_CALLS]` and then `[{"name": .., "arguments": {..}}, ..]`, or `name[ARGS]{..}`: Mistral.
    Mistral,
    /// `<function=NAME>{..}</function>`, once for each call: Functionary 3.1.
    Functionary,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`: Qwen3-Coder, Step.
    QwenCoder,
    /// The same inside of `<seed:tool_call>`: Seed-OSS.
    Seed,
    /// `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`: GLM from 4.5 on.
    Glm,
}

const QWEN_CODER: Tags = Tags {
    open: "<tool_call>",
    name: Some(("<function=", ">")),
    key: ("<parameter=", ">"),
    value: ("", "</parameter>"),
    lines: true,
    end: "</function>",
    close: "</tool_call>",
};
const SEED: Tags = Tags { open: "<seed:tool_call>", close: "</seed:tool_call>", ..QWEN_CODER };
const GLM: Tags = Tags {
    name: None,
    key: ("<arg_key>", "</arg_key>"),
    value: ("<arg_value>", "</arg_value>"),
    lines: false,
    end: "",
    ..QWEN_CODER
};

impl ToolStyle {
    /// The tags of a call whose values stand as they are, and not as JSON.
    pub(super) fn tags(self) -> Option<&'static Tags> {
        match self {
            ToolStyle::Hermes | ToolStyle::Llama | ToolStyle::Mistral | ToolStyle::Functionary => None,
            ToolStyle::QwenCoder => Some(&QWEN_CODER),
            ToolStyle::Seed => Some(&SEED),
            ToolStyle::Glm => Some(&GLM),
        }
    }

    /// The mark before a call; Llama's calls do without it at the start.
    pub(super) fn open(self) -> &'static str {
        match self {
            ToolStyle::Llama => "<|python_tag|>",
            ToolStyle::Mistral => "[TOOL_CALLS]",
            ToolStyle::Functionary => "<function=",
            style => style.tags().map_or("<tool_call>", |tags| tags.open),
        }
    }

    /// The mark after a call, where each call has one.
    pub(super) fn close(self) -> Option<&'static str> {
        match self {
            ToolStyle::Llama | ToolStyle::Mistral => None,
            ToolStyle::Functionary => Some("</function>"),
            style => Some(style.tags().map_or("</tool_call>", |tags| tags.close)),
        }
    }

    /// Whether several calls are written as one is, one after the other.
    pub fn repeats(self) -> bool {
        self.close().is_some()
    }

    /// Returns how an argument is written that is not JSON: what stands before its name, between it and the value, after a
    /// value on its line, and after that, before a line's end. What stands before the first and after the last argument is
    /// in [`ToolStyle::around`].
    pub fn argument(self) -> Option<[&'static str; 4]> {
        match self {
            ToolStyle::Hermes | ToolStyle::Llama | ToolStyle::Mistral | ToolStyle::Functionary => None,
            ToolStyle::QwenCoder => Some(["<parameter=", ">\n", "\n", "</parameter>"]),
            ToolStyle::Seed => Some(["<parameter=", ">", "", "</parameter>"]),
            ToolStyle::Glm => Some(["<arg_key>", "</arg_key>\n<arg_value>", "", "</arg_value>"]),
        }
    }

    /// Returns what stands before and after the arguments of a call, and so what a constraint on the text has to allow:
    /// `name` is one of the request's, and needs no quoting.
    pub fn around(self, name: &str) -> (String, &'static str) {
        match self {
            ToolStyle::QwenCoder => (format!("<tool_call>\n<function={name}>\n"), "</function>\n</tool_call>"),
            ToolStyle::Seed => (format!("<seed:tool_call>\n<function={name}>\n"), "</function>\n</seed:tool_call>"),
            ToolStyle::Functionary => (format!("<function={name}>"), "</function>"),
            ToolStyle::Glm => (format!("<tool_call>{name}\n"), "</tool_call>"),
            ToolStyle::Hermes => (format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": "), "}\n</tool_call>"),
            ToolStyle::Llama => (format!("{{\"name\": \"{name}\", \"parameters\": "), "}"),
            ToolStyle::Mistral => (format!("[TOOL_CALLS][{{\"name\": \"{name}\", \"arguments\": "), "}]"),
        }
    }
}

/// The tags around a model's reasoning, which comes before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningStyle {
    /// Before it.
    pub open: &'static str,
    /// After it.
    pub close: &'static str,
}

/// `<think>`: Qwen3, DeepSeek-R1 and most others.
const THINK: ReasoningStyle = ReasoningStyle { open: "<think>", close: "</think>" };
/// Every known pair.
const REASONING: [ReasoningStyle; 3] = [
    THINK,
    ReasoningStyle { open: "<seed:think>", close: "</seed:think>" },
    ReasoningStyle { open: "[THINK]", close: "[/THINK]" },
];

/// How an answer begins, by the prompt that the template made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Opening {
    /// The model may open its reasoning itself.
    #[default]
    Free,
    /// The prompt ends inside the reasoning.
    Inside,
    /// The prompt ends with reasoning that is over, empty as a rule: the answer has none.
    Over,
}

/// What an operator says of a model, against what its template tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The form of its calls; `Some(None)`: it makes none.
    pub tools: Option<Option<ToolStyle>>,
    /// The form of its reasoning; `Some(None)`: it shows none.
    pub reasoning: Option<Option<ReasoningStyle>>,
}

impl Overrides {
    /// Reads the two words of a configuration.
    ///
    /// # Errors
    /// The key that is wrong, and the words that it takes.
    pub fn read(tools: Option<&str>, reasoning: Option<&str>) -> Result<Self, (&'static str, &'static str)> {
        let tools = match tools {
            None | Some("auto") => None,
            Some("none") => Some(None),
            Some("hermes") => Some(Some(ToolStyle::Hermes)),
            Some("llama") => Some(Some(ToolStyle::Llama)),
            Some("mistral") => Some(Some(ToolStyle::Mistral)),
            Some("functionary") => Some(Some(ToolStyle::Functionary)),
            Some("qwen3_coder") => Some(Some(ToolStyle::QwenCoder)),
            Some("seed_oss") => Some(Some(ToolStyle::Seed)),
            Some("glm45") => Some(Some(ToolStyle::Glm)),
            Some(_) => {
                let words = "auto, hermes, llama, mistral, functionary, qwen3_coder, seed_oss, glm45 or none";
                return Err(("tool_parser", words));
            }
        };
        let reasoning = match reasoning {
            None | Some("auto") => None,
            Some("none") => Some(None),
            Some("think") => Some(Some(THINK)),
            Some(_) => return Err(("reasoning_parser", "auto, think or none")),
        };
        Ok(Overrides { tools, reasoning })
    }
}

/// In which form a model reasons and calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// The form of its calls; none when calls can't be told from text.
    pub tools: Option<ToolStyle>,
    /// The tags of its reasoning.
    pub reasoning: Option<ReasoningStyle>,
    /// Whether its template prints the tools that it is given.
    pub takes_tools: bool,
}

impl Style {
    /// Reads the style off a chat template's text.
    pub fn of_template(source: &str) -> Self {
        let has = |text: &str| source.contains(text);
        // Templates of other forms share some marks.
        let tools = match () {
            () if has("<arg_key>") && has("<tool_call>") => Some(ToolStyle::Glm),
            () if has("<function=") && has("<parameter=") && has("<seed:tool_call>") => Some(ToolStyle::Seed),
            () if has("<function=") && has("<parameter=") && has("<tool_call>") => Some(ToolStyle::QwenCoder),
            () if has("<function=") && has("</function>") && !has("<parameter") => Some(ToolStyle::Functionary),
            () if has("<function=") || has("<arg_key>") || has("functools[") || has("<tool_calls>[") => None,
            () if has("<tool_call>") => Some(ToolStyle::Hermes),
            () if has("[TOOL_CALLS]") => Some(ToolStyle::Mistral),
            () if has("<|python_tag|>") || (has("ipython") && has("\"parameters\"")) => Some(ToolStyle::Llama),
            () => None,
        };
        let reasoning = REASONING.into_iter().find(|tags| has(tags.close));
        Style { tools, reasoning, takes_tools: has("tools") }
    }

    /// Returns the style with an operator's word put over it.
    #[must_use]
    pub fn with(self, overrides: Overrides) -> Self {
        Style {
            tools: overrides.tools.unwrap_or(self.tools),
            reasoning: overrides.reasoning.unwrap_or(self.reasoning),
            ..self
        }
    }

    /// Returns the texts of control tokens that a parser has to see, though clients never do.
    pub fn marks(&self) -> Vec<&'static str> {
        let tools: &[&'static str] = match self.tools {
            Some(ToolStyle::Hermes) => &["<tool_call>", "</tool_call>"],
            Some(ToolStyle::Llama) => &["<|python_tag|>"],
            Some(ToolStyle::Mistral) => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Some(ToolStyle::Functionary) => &[],
            Some(ToolStyle::QwenCoder) => &["<tool_call>", "</tool_call>"],
            Some(ToolStyle::Seed) => &["<seed:tool_call>", "</seed:tool_call>"],
            Some(ToolStyle::Glm) => {
                &["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
            }
            None => &[],
        };
        let reasoning = self.reasoning.iter().flat_map(|tags| [tags.open, tags.close]);
        tools.iter().copied().chain(reasoning).collect()
    }

    /// Returns how an answer to `prompt` begins.
    pub fn opening(&self, prompt: &str) -> Opening {
        let end = prompt.trim_end();
        match self.reasoning {
            Some(tags) if end.ends_with(tags.open) => Opening::Inside,
            Some(tags) if end.ends_with(tags.close) => Opening::Over,
            _ => Opening::Free,
        }
    }
}
