//! In which form a model reasons and calls tools, by its chat template or by its operator's word.

/// The form of a model's tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolStyle {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, once for each call: Qwen, Hermes.
    Hermes,
    /// `{"name": .., "parameters": {..}}` from the start, or after `<|python_tag|>`; more calls after `;`: Llama 3.
    Llama,
    /// `[TOOL_CALLS]` and then `[{"name": .., "arguments": {..}}, ..]`, or `name[ARGS]{..}`: Mistral.
    Mistral,
}

impl ToolStyle {
    /// The mark before a call; Llama's calls do without it at the start.
    pub(super) fn open(self) -> &'static str {
        match self {
            ToolStyle::Hermes => "<tool_call>",
            ToolStyle::Llama => "<|python_tag|>",
            ToolStyle::Mistral => "[TOOL_CALLS]",
        }
    }

    /// Returns what stands before and after the arguments of a call, and so what a constraint on the text has to allow:
    /// `name` is one of the request's, and needs no quoting.
    pub fn around(self, name: &str) -> (String, &'static str) {
        match self {
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
            Some(_) => return Err(("tool_parser", "auto, hermes, llama, mistral or none")),
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
        // Templates of other forms share some marks: calls as XML, or by key and value.
        let foreign = has("<function=") || has("<arg_key>") || has("functools[");
        let tools = match () {
            () if foreign => None,
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
