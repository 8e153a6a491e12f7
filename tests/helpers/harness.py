"""Tasks of the lm-evaluation-harness on local rows."""

from __future__ import annotations

_ROWS = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
"""
HARNESS_TASK = (
    "task: stun_heldout"
    + _ROWS
    + """output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["<never>"], do_sample: false, max_gen_toks: 64}}
filter_list:
  - name: marker
    filter:
      - {{function: regex, regex_pattern: "#### *([^\\n]*)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
)

LIKELIHOOD_TASK = (
    "task: stun_text"
    + _ROWS
    + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte}}
  - {{metric: byte_perplexity}}
"""
)
