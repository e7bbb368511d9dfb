"""Prints what transformers renders for the sources in tokenizer.rs, `dialect_of_hugging_face`.

pip install transformers jinja2; last run with transformers 5.23.0, jinja2 3.1.
"""

from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGES = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello there!"},
    {"role": "user", "content": "12 + 30?"},
    {"role": "assistant", "content": "42"},
]

SOURCES = [
    "{{ bos_token }}{% if tools is not none and tools %}T{% endif %}{{ documents is none }}",
    "{{ messages[1] | tojson }}",
    "{{ {'a': '<é>', 'b': [1, true]} | tojson }}",
    "{{ [1, 2] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}",
    "{{ ' x '.strip() }}{{ 'a,b'.split(',')[-1] }}{{ 'AbC'.lower() }}{{ 'abc'.startswith('ab') }}",
    "{{ messages[0]['content'] | trim }}{{ messages | length }}{{ messages[1:] | map(attribute='role') | list | length }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ messages[0].content is string }}{{ messages[0].x is defined }}",
    "a\n  {% if true %}\nb\n  {% endif %}\nc",
    "{{ messages[0].nothing }}|{{ nothing }}|{{ none }}|{{ 1.0 }}|{{ [1, 'a', none, true] }}|{{ {'k': 'v'} }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content.replace('l', 'L') }}{% endfor %}",
    "{{ messages[-1].content.strip().split('4') | last }}{{ 'x' ~ 1 }}{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}",
    "{%- for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].get('nope', 'd') }}",
]

for source in SOURCES:
    template = _compile_jinja_template(source)
    print(repr(template.render(messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>")))
