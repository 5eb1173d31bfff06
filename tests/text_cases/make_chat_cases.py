#!/usr/bin/env python3
"""Writes chat_cases.json: templates, messages, and what Jinja2 renders in the settings of transformers.

    python3 make_chat_cases.py > chat_cases.json      (needs jinja2 3.1)

A render that fails has "error": true instead of "text".
"""
import json
import sys

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = 'Be brief.' -%}
    {%- set rest = messages -%}
{%- endif -%}
{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- for message in rest -%}
    {{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

THINKING = """{%- set tools = [{'type': 'function', 'function': {'name': 'add', 'parameters': {'a': 1, 'b': [true, none, 2.5]}}}] %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- if loop.last or (not loop.last and reasoning) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}{{ tool_call.name }}{%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("DATE") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call only") }}{%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

BARS = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<\uff5cUser\uff5c>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}{{'<\uff5cAssistant\uff5c>' + content + '<\uff5cend\u2581of\u2581sentence\uff5c>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}"""

ROLES = """{%- macro role_head(message) -%}
  {%- set name = message.get('name') or message.role -%}
  {%- if message.role == 'user' -%}<|im_user|>{{ name }}<|im_middle|>
  {%- elif message.role == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>
  {%- else -%}<|im_system|>{{ name }}<|im_middle|>
  {%- endif -%}
{%- endmacro -%}
{%- if messages|length > 0 and messages[0]['role'] != 'system' -%}
  <|im_system|>system<|im_middle|>You are a helper.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {{- role_head(message) -}}
  {%- if message['content'] is string -%}{{ message['content'] }}
  {%- elif message['content'] is not none -%}
    {%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}"""

LARGE = {"chatml": CHATML, "thinking": THINKING, "headers": HEADERS, "bars": BARS, "roles": ROLES}

SMALL = r"""
plain text, no tag
{{ 1 + 2 * 3 - 4 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1.5 + 1 }} {{ 10 % 4.5 }} {{ -7.5 // 2 }}
{{ 1e3 }} {{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e20 }} {{ 1e-7 }} {{ 123456789012345678 }} {{ 0x1F }} {{ 1_000 }} {{ 3.14e2 }} {{ 0b101 }}
{{ 'a' ~ 1 ~ none ~ true ~ 2.0 ~ [1, 'x'] }}
{{ [1, 'a', "it's", none, true, 1.5, [2], {'k': 'v'}] }} {{ (1,) }} {{ (1, 2) }} {{ {} }} {{ [] }} {{ () }}
{{ 'a\nb\t"q"\\ \x41 \u00e9 \101 \q' }}|{{ "it's" }}|{{ 'con' 'cat' }}
{{ ['a\nb', 'tab\t', 'q"\'', "é\x7f", '\u200b'] }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 1 == 1.0 }} {{ true == 1 }} {{ 'a' == 1 }} {{ none == false }} {{ 1 != 2 }} {{ (1, 2) == [1, 2] }}
{{ 'b' in 'abc' }} {{ 'x' not in ['x'] }} {{ 1 in {1: 2} }} {{ 'k' in {'k': 1} }} {{ 'x' in undefined_name }}
{{ not true or true and false }} {{ not (true or true) }} {{ 1 and 0 or 'z' }} {{ '' or 'fallback' }} {{ 0 or none }} {{ 3 and 4 }}
{{ 'yes' if messages else 'no' }} {{ 'yes' if false }}| {{ 1 if false else 2 if false else 3 }}
{{ undefined_name }}|{{ messages[0].nothing }}|{{ messages[99] }}|{{ undefined_name is defined }} {{ messages is defined }} {{ undefined_name | default('d') }} {{ '' | default('d', true) }} {{ none | d('x') }}
{{ undefined_name.attribute }}
{{ undefined_name + 'x' }}
{{ 'x' + 1 }}
{{ messages[0]['content'][0] }} {{ 'hello'[1:3] }} {{ 'hello'[::-1] }} {{ 'hello'[-3:] }} {{ 'hello'[:-1] }} {{ 'héllo'[1] }} {{ [1,2,3,4][::2] }} {{ [1,2,3][5:] }} {{ [1,2,3][-1] }} {{ (1,2,3)[1:] }} {{ 'abc'[10:] }}| {{ [1,2,3][:0:-1] }}
{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ loop.revindex }} {{ loop.revindex0 }} {{ loop.previtem.role if loop.previtem is defined else '-' }} {{ loop.nextitem.role if loop.nextitem is defined else '-' }} {{ loop.cycle('a', 'b') }};{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ m.content }}{% else %}none{% endfor %}|{% for x in [] %}x{% else %}empty{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }},{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for c in 'añb' %}{{ c }}.{% endfor %}
{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %} {{ range(2, 9, 3) | list }} {{ range(3) | length }}
{% for a in [1, 2] %}{% for b in [3, 4] %}{{ a }}{{ b }}{{ loop.index }}{{ loop.depth }} {% endfor %}{{ loop.index }}{% endfor %}
{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}
{% set ns = namespace(n=0, s='') %}{% for i in [1, 2, 3] %}{% set ns.n = ns.n + i %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.n }} {{ ns.s }} {{ ns.missing }}
{% set a, b = 1, 'two' %}{{ a }}{{ b }}{% set c = (1, 2) %}{{ c }}{% set d = 1, 2 %}{{ d }}
{% set block %}in {{ 1 + 1 }} block{% endset %}[{{ block }}]{% set up | upper | trim %}  shout {% endset %}[{{ up }}]
{% filter upper %}loud {{ 'x' }}{% endfilter %} {% filter replace('a', 'b') | trim %} banana {% endfilter %}|
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}
{% macro greet(name, mark='!') %}Hi {{ name }}{{ mark }}{% endmacro %}{{ greet('A') }} {{ greet('B', '?') }} {{ greet(mark='.', name='C') }} {{ greet() }}
{% macro box(title) %}[{{ title }}: {{ caller() }}]{% endmacro %}{% call box('T') %}inner {{ 1 + 1 }}{% endcall %}
{% macro lister(items) %}{% call(i) each(items) %}<{{ i }}>{% endcall %}{% endmacro %}{% macro each(items) %}{% for i in items %}{{ caller(i) }}{% endfor %}{% endmacro %}{{ lister([1, 2]) }}
{% macro down(n) %}{{ n }}{% if n > 0 %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(4) }}
{% set g = 'global' %}{% macro see() %}{{ g }}{% endmacro %}{{ see() }}{% set g = 'later' %}{{ see() }}
{{ '  x '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ '  a'.lstrip() }}|{{ 'a\n\n'.rstrip('\n') }}|{{ 'a,b,,c'.split(',') }}|{{ ' a  b c '.split() }}|{{ 'a,b,c'.split(',', 1) }}|{{ ' a b  c '.split(none, 1) }}|{{ 'a-b-c'.rsplit('-', 1) }}|{{ 'a\nb\r\nc\n'.splitlines() }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'aBc'.upper() }} {{ 'aBc'.lower() }} {{ 'hello wORLD'.title() }} {{ 'hELLO'.capitalize() }} {{ 'banana'.replace('a', 'o') }} {{ 'banana'.replace('a', 'o', 1) }} {{ '-'.join(['a', 'b']) }} {{ 'banana'.find('n') }} {{ 'banana'.rfind('n') }} {{ 'x'.find('y') }} {{ 'banana'.count('a') }} {{ 'ab'.replace('', '-') }} {{ 'héé'.find('é') }}
{{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ ' '.isspace() }} {{ 'A'.isupper() }} {{ 'a'.islower() }} {{ ''.isdigit() }} {{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }} {{ 'banana'.index('n') }}
{{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b') }} {{ {'a': 1}.get('b', 2) }} {{ {'a': 1, 'b': 2}.keys() | list }} {{ {'a': 1}.values() | list }} {{ {'items': 5}['items'] }} {{ {'a': {'b': 3}}.a.b }} {{ {'a': 1, 'a': 2} }} {{ [1, 2, 1].count(1) }} {{ [1, 2].index(2) }}
{{ {'b': 1, 'a': [1, 2.0, true, none, 'x"y\n\u00e9\u0001</']} | tojson }} {{ {'b': 1, 'a': [1, {}, []]} | tojson(indent=2) }} {{ [] | tojson(indent=4) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }} {{ 'é😀' | tojson(ensure_ascii=true) }} {{ {1: 2, none: 3, true: 4} | tojson }} {{ [1, 2] | tojson(separators=(',', ':')) }}
{{ undefined_name | tojson }}
{{ [3, 1, 2] | sort }} {{ ['b', 'A', 'c'] | sort }} {{ ['b', 'A', 'c'] | sort(case_sensitive=true) }} {{ [3, 1] | sort(reverse=true) }} {{ messages | sort(attribute='role') | map(attribute='role') | list }} {{ [1, 2, 1] | unique | list }} {{ [1, 5, 2] | max }} {{ [4, 1] | min }} {{ [1, 2] | sum }} {{ [1.5, 2] | sum }}
{{ messages | map(attribute='role') | join(', ') }} {{ ['a', 'b'] | map('upper') | list }} {{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }} {{ messages | rejectattr('role', 'eq', 'user') | list | length }} {{ [1, 2, 3] | select('odd') | list }} {{ [1, 2, 3] | reject('odd') | list }} {{ [0, 1] | select | list }} {{ messages | selectattr('absent') | list }} {{ messages | map(attribute='absent', default='-') | list }}
{{ ' x ' | trim }}| {{ 'xax' | trim('x') }} {{ [1, 2, 3] | first }} {{ [1, 2, 3] | last }} {{ 'abc' | reverse }} {{ [1, 2] | reverse | list }} {{ 'abc' | list }} {{ 5 | string }} {{ '7' | int + 1 }} {{ 'x' | int(3) }} {{ '1.5' | float }} {{ 3.9 | int }} {{ -3 | abs }} {{ 2.567 | round(1) }} {{ 2.5 | round }} {{ 2.1 | round(0, 'ceil') }} {{ 'hello world-x' | title }} {{ 'hELLO' | capitalize }} {{ 'a' | upper }} {{ 'ab' | length }} {{ 'a b' | replace(' ', '_') }} {{ [] | first }}|
{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ '<a & "b">' | e }}|{{ {'b': 1, 'a': 2} | dictsort }}|{{ {'b': 1} | items | list }}|{{ {'a': 1} | length }}
{{ 1 is number }} {{ 1.0 is float }} {{ 1 is integer }} {{ true is integer }} {{ true is boolean }} {{ 'a' is string }} {{ {} is mapping }} {{ [] is iterable }} {{ [] is sequence }} {{ 1 is iterable }} {{ none is none }} {{ 1 is not none }} {{ 3 is odd }} {{ 4 is even }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(2) }} {{ 1 is eq 1 }} {{ 1 is in [1] }} {{ 'a' is lower }} {{ 'A' is upper }} {{ true is true }} {{ 1 is true }} {{ range is callable }} {{ 1 is sameas 1 }} {{ 2 is gt 1 }} {{ 'x' is filter }}
{{ -1 | abs }} {{ -2 ** 2 }} {{ 2 ** 3 ** 2 }} {{ 'a' ~ 'b' | upper }} {{ 1 + 2 | string | int }} {{ not 1 is defined }} {{ (1, 2) | length }} {{ - 'a' | length }}
{{ [1, 2] + [3] }} {{ 'ab' * 2 }} {{ [0] * 3 }} {{ 3 * 'x' }} {{ (1,) + (2,) }}
{{ dict(a=1, b='x') }} {{ dict({'a': 1}, b=2) }}
{{ raise_exception('no ' ~ messages[0].role) }}
{{ messages.append(1) }}
{{ messages[0].update({'a': 1}) }}
{{ 'abc'.nothing() }}
{{ nothing() }}
{{ 1 / 0 }}
{{ 1 < 'a' }}
{{ for }}
{% if %}x{% endif %}
{% for x in y %}
{% endfor %}
{% unknown %}
{{ 'open }}
{{ 1 | nofilter }}
{{ 1 is notest }}
{% if x %}{% elif y %}b{% else %}c{% endif %}{% if 0 %}{% elif 1 %}d{% endif %}
a{# comment #}b{#- c -#} d {#+ e +#} f
{% raw %}{{ not }} {% if %}{% endraw %} {%- raw -%}  x  {%- endraw -%} y
{{- '  a  ' -}}   b   {{ 'c' -}}   d
{{ '}}' }}{{ "{%" }}{{ {'a': {'b': 1}}['a']['b'] }}{{ {'x': '}'}.x }}
{{ messages | length }}{{ messages[-1].role }}{{ messages[0]["role"] }}{{ (messages | first).role }}{{ messages[:1][0].role }}
{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ add_generation_prompt }}
{% set x = none %}{{ x is none }} {{ x }} {{ x | string }} {% set y = true %}{{ y }} {{ True }} {{ None }} {{ False }}
{% generation %}inside{% endgeneration %} after
{% for x in none %}{% endfor %}
{% set a.b = 1 %}
{{ loop is defined }}{% for i in [1] %}{% set outer = loop %}{% for j in [1] %}{{ outer.index }}{{ loop.index }}{% endfor %}{% endfor %}
{{ namespace(a=1).a }} {{ 'a.b'.split('.')[1] }} {{ [[1, 2], [3, 4]] | map('first') | list }} {{ [[1, 2]] | map(attribute=1) | list }} {{ [{'a': {'b': 7}}] | map(attribute='a.b') | list }}
{{ 'x' if messages[0].role is in ['user', 'system'] and true else 'y' }}
{% if messages[0].role == 'user' and not messages[0].content is none %}ok{% endif %}
"""

WHITESPACE = {
    "ws1": "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "ws2": "a\n  {%- if true -%}\n  b\n  {%- endif -%}\nc\n\n",
    "ws3": "  {%+ if true %}\n x {%+ endif +%}\n y",
    "ws4": "a\n\t{# note #}\nb {# note #}\nc{#- x -#}\n d",
    "ws5": "{% set x = 1 %}   {% set y = 2 %}\n{{ x }}\n  {{ y }}\nend\n",
    "ws6": "x\r\ny\rz {% if 1 %}\r\n w{% endif %}\r\n",
    "ws7": "{% for i in [1, 2] %}\n  - {{ i }}\n{% endfor %}\n\n",
    "ws8": "a \u00a0{%- if 1 %} b{% endif -%} \u2003 c",
    "ws9": "{% raw %}\n  {{ x }}\n  {% endraw %}\nz",
    "ws10": "{{ 1 }}\n{{ 2 -}}\n\n 3 {{- 4 }}",
}

CONVERSATIONS = [
    [{"role": "user", "content": " Hello, wörld! "}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"},
     {"role": "assistant", "content": "<think>\nfour\n</think>\n\n4"}, {"role": "user", "content": "<tool_response>x</tool_response>"},
     {"role": "assistant", "content": "<think>a</think>b"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "r1"},
     {"role": "tool", "content": "r2"}],
]


def environment():
    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

        def _render(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: form  # the cases give a format without any %
    return env


def main():
    env = environment()
    templates = list(LARGE.items()) + list(WHITESPACE.items())
    templates += [(f"small{i}", line) for i, line in enumerate(SMALL.strip("\n").split("\n"))]
    cases = []
    for name, source in templates:
        large = name in LARGE
        case = {"name": name, "template": source, "renders": []}
        for which, messages in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                if not large and (which, prompt) != (1, True):
                    continue
                render = {"messages": which, "prompt": prompt}
                try:
                    render["text"] = env.from_string(source).render(
                        messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", tools=None,
                        documents=None)
                except Exception as error:  # whatever Python raises, the case has to fail
                    render["error"] = True
                    print(name, repr(error)[:100], file=sys.stderr)
                case["renders"].append(render)
        cases.append(case)
    json.dump({"conversations": CONVERSATIONS, "cases": cases}, sys.stdout, ensure_ascii=True, indent=0)
    print()


main()
