"""All texts of the card and the document, in English and Korean side by side.

`Words` fills in the fields in braces. The names that a run gives (clocks, phases, metrics) are not translated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cecompile.report import units

LANGUAGES = ("ko", "en")
DASH = "–"  # for an unknown value

# name: (English, Korean)
TEXTS = {
    # Card
    "card.latency": ("{clock} latency", "{clock} 소요 시간"),
    "card.per_question": ("per question", "문항당 추론"),
    "card.questions": ("{task}, {questions} questions", "{task}, {questions}문항"),
    "card.parameters": ("{parameters} parameters", "매개변수 {parameters}개"),
    "card.fingerprint": ("model SHA-256", "모델 SHA-256"),
    "card.in_tree": ("answered in the tree", "트리 안 응답"),
    "seconds": ("{value} s", "{value}초"),
    "percent": ("{value} %", "{value}%"),
    "no_labels": ("no labels", "정답 없음"),
    "clock.strict": ("all but preprocessing", "전처리를 뺀 전체"),
    "clock.section3": ("preprocessing and inference", "전처리와 추론"),
    "clock.inference": ("inference alone", "추론만"),
    "verdict.within": ("drop from {baseline} within {max_drop} points: {drops}",
                       "{baseline} 대비 하락 폭 {max_drop}점 이내: {drops}"),
    "verdict.past": ("drop from {baseline} PAST {max_drop} points: {drops}",
                     "{baseline} 대비 하락 폭 {max_drop}점 초과: {drops}"),
    "verdict.drop": ("{metric} {drop} points", "{metric} {drop}점"),
    # Document: frame
    "title": ("Multiple-choice evaluation with packed token trees", "토큰 트리 패킹을 이용한 객관식 벤치마크 평가"),
    "none": ("none", "없음"),
    "not_recorded": ("not recorded", "기록 없음"),
    "model": ("model", "모델"),
    "data": ("data", "데이터"),
    "device": ("device", "장치"),
    "ranks": ("{ranks} ranks", "랭크 {ranks}개"),
    "date": ("date", "실행 일시"),
    "summary.latency": ("{clock} latency, {gloss}", "{clock} 소요 시간({gloss})"),
    "summary.inference": ("inference, {per} s per question", "추론 시간, 문항당 {per}초"),
    # 1
    "task": ("The task", "과제"),
    "task.scoring": (
        "{questions} questions ({data}) of a context and several choices each, {choices} choices in all. A choice's "
        "score is its loglikelihood: the sum of the log-probabilities of its tokens after the context. acc is the "
        "share of questions whose correct choice has the highest loglikelihood; acc_norm divides each loglikelihood "
        "by the choice's length in characters first. Text, tokens, truncation, metrics and ties follow "
        "lm-evaluation-harness.",
        "{data}의 {questions}문항을 평가했다. 문항마다 문맥 하나와 여러 선택지가 있으며 선택지는 모두 {choices}개이다. "
        "선택지의 점수는 로그우도, 곧 문맥에 이어 그 선택지의 토큰들이 나올 로그확률의 합이다. acc는 정답 선택지의 "
        "로그우도가 가장 높은 문항의 비율이고, acc_norm은 로그우도를 선택지의 글자 수로 나눈 값으로 같은 비율을 구한 "
        "것이다. 텍스트 구성, 토큰화, 길이 초과 처리, 지표와 동점 처리는 모두 lm-evaluation-harness의 방식을 따른다."),
    "task.chat": (
        "{questions} questions ({data}), each a chat in which the choices are listed; the model writes its answer by "
        "greedy decoding, at most {new_tokens} tokens. exact_match is the share of answers that, without white space "
        "in front and line breaks, equal the expected text.",
        "{data}의 {questions}문항을 평가했다. 각 문항은 선택지를 나열한 대화이고, 모델은 최대 {new_tokens}개의 토큰을 "
        "그리디 디코딩으로 생성해 답한다. exact_match는 생성한 텍스트에서 앞쪽 공백과 줄바꿈을 뺀 것이 정답과 똑같은 "
        "문항의 비율이다."),
    "task.truncated": ("{count} questions were longer than the model can read and were cut on the left.",
                       "{count}문항은 모델이 읽을 수 있는 길이를 넘어 왼쪽을 잘라 냈다."),
    "task.no_labels": ("The data has no labels, so there are predictions but no accuracy.",
                       "데이터에 정답이 없어 예측만 기록했고 정확도는 계산하지 않았다."),
    # 2
    "rules": ("The rules and how they are met", "대회 규칙과 준수 방법"),
    "rules.rule": ("rule", "규칙"),
    "rules.met": ("in this run", "이 실행에서"),
    "rule.time": ("Only data preprocessing is left out of the time.", "시간 측정에서 데이터 전처리만 제외한다."),
    "rule.time.met": (
        "The strict latency, {strict} s, is the whole time of the run but preprocess ({preprocess} s). Loading and "
        "warm-up with its compilation count. As the 2024 contest's script timed, section3: {section3} s.",
        "strict 소요 시간 {strict}초는 전체 실행 시간에서 preprocess({preprocess}초)만 뺀 값이다. 모델 적재와 컴파일을 "
        "포함한 워밍업도 들어 있다. 2024년 대회 스크립트의 측정 구간에 해당하는 section3은 {section3}초이다."),
    "rule.accuracy": ("Accuracy stays within 0.5 points of the unmodified model's.",
                      "정확도 하락은 원본 모델 대비 0.5점 이내여야 한다."),
    "rule.accuracy.met": (
        "Drop from {baseline}: {drops}; {max_drop} points are allowed: {verdict}. The same prediction on {agreement} "
        "of the questions.",
        "기준 결과 {baseline} 대비 하락 폭은 {drops}이고 허용치는 {max_drop}점이다({verdict}). 예측 일치율은 "
        "{agreement}이다."),
    "rule.accuracy.unmet": ("This result has not been compared with a baseline.",
                            "이 결과는 아직 기준 결과와 비교하지 않았다."),
    "within": ("within", "허용치 이내"),
    "past": ("past it", "허용치 초과"),
    "rule.weights": ("Weights and activations are unchanged: no quantisation, no pruning, no training.",
                     "가중치와 활성값을 바꾸지 않는다(양자화, 가지치기, 재학습 금지)."),
    "rule.weights.met": (
        "The fingerprint, SHA-256 over the names, dtypes, shapes and bytes of all tensors, begins {fingerprint} (whole "
        "in section {section}).",
        "모든 텐서의 이름, dtype, 형태, 바이트에 대한 SHA-256 지문은 {fingerprint}로 시작한다(전체 값은 {section}절)."),
    "rule.weights.device": ("That of the tensors on the device begins {fingerprint}.",
                            "장치에 있는 텐서의 지문은 {fingerprint}로 시작한다."),
    "rule.weights.verified": ("Checked on the device: {verified}.", "장치에서 검사한 결과: {verified}."),
    "rule.weights.dtype": ("Stored as {stored}, computed in {dtype}.",
                           "저장된 형식은 {stored}, 계산 형식은 {dtype}이다."),
    "rule.weights.computed": ("Computed in {dtype}.", "계산 형식은 {dtype}이다."),
    "rule.weights.changed": (
        "Changed on the way to the device: attention function {attention}; compiled {compiled}; replaced modules "
        "{replaced}.",
        "실행을 위해 바뀐 것은 다음과 같다. 어텐션 함수: {attention}, 컴파일한 모듈: {compiled}, 교체한 모듈: "
        "{replaced}."),
    "rule.output": ("The output has the form of the transformers pipeline's.",
                    "출력은 transformers 파이프라인의 출력과 같은 형식이어야 한다."),
    "rule.output.met": ('predictions.jsonl, a line per question: [{{"generated_text": "..."}}].',
                        'predictions.jsonl에 문항마다 한 줄씩 [{{"generated_text": "..."}}] 형식으로 기록한다.'),
    "rule.data": ("Nothing but the given data is used.", "주어진 데이터만 사용한다."),
    "rule.data.met": (
        "{data}; SHA-256 over its questions begins {digest}. No examples, no training. Compiled code of earlier runs: "
        "{cache}.",
        "{data}만 사용했고 문항의 SHA-256은 {digest}로 시작한다. 예시 문항도 추가 학습도 없다. 이전 실행에서 만든 "
        "컴파일 캐시의 상태: {cache}."),
    "rule.torch": ("PyTorch 2 is used.", "PyTorch 2를 사용한다."),
    "rule.torch.met": (
        "torch {torch}, transformers {transformers}; the model is the stock class {architecture}.",
        "torch {torch}, transformers {transformers}를 사용했고 모델은 transformers의 {architecture} 클래스이다."),
    "rule.credits": ("Open source is credited.", "사용한 오픈소스의 출처를 밝힌다."),
    "rule.credits.met": ("Section {section}.", "{section}절에 밝혔다."),
    "rule.reproducible": ("The result can be reproduced.", "결과를 재현할 수 있어야 한다."),
    "rule.reproducible.met": ("Section {section}.", "{section}절의 명령으로 재현한다."),
    # 3
    "method": ("The method", "방법"),
    "method.tree": (
        "<b>One tree instead of many sequences.</b> The usual way runs every choice as a sequence of its own and "
        "computes the context once for each. Here choices that begin alike share their tokens: the context is the "
        "trunk of a <b>token tree</b>, the choices are its branches, and questions that begin alike share a trunk too. "
        "A choice's last token is predicted but never read. In figure {figure} {tree} of {unshared} tokens are left.",
        "<b>여러 시퀀스 대신 트리 하나.</b> 보통은 선택지마다 별도의 시퀀스를 만들어 같은 문맥을 선택지 수만큼 다시 "
        "계산한다. 여기서는 앞부분이 같은 토큰을 한 번만 계산한다. 문맥이 <b>토큰 트리</b>의 줄기가 되고 선택지가 "
        "가지가 되며, 시작이 같은 문항끼리도 줄기를 공유한다. 선택지의 마지막 토큰은 예측 대상일 뿐 입력으로 읽지 "
        "않는다. 그림 {figure}의 예에서는 {unshared}개의 토큰이 {tree}개로 줄어든다."),
    "method.mask": (
        "<b>The mask is one integer a token.</b> Written depth first, with end[k] one past the last token of k's "
        "subtree, key k is visible to query q if and only if k ≤ q &lt; end[k]. A token's position id is its depth, so "
        "each token sees exactly what it would see in its own sequence, at the same positions.",
        "<b>마스크는 토큰당 정수 하나.</b> 트리를 깊이 우선으로 늘어놓고 k의 부분 트리가 끝난 다음 자리를 end[k]라 "
        "하면, 쿼리 q는 k ≤ q &lt; end[k]인 키 k만 본다. 위치 번호는 트리에서의 깊이이다. 따라서 각 토큰은 자기 "
        "시퀀스를 따로 계산할 때와 똑같은 토큰을 똑같은 위치에서 본다."),
    "method.pack": (
        "<b>Static passes.</b> Trees are packed into rows, rows into at most four fixed shapes, the buckets. Each "
        "bucket is one forward pass of the stock transformers model. Only tokens of choices are read out, so no table "
        "of positions by vocabulary is held. No tensor's shape changes from pass to pass. {engine}",
        "<b>정적 실행.</b> 트리를 행에, 행을 최대 네 가지 고정된 형태(버킷)에 채운다. 버킷 하나는 transformers 원본 "
        "모델의 순전파 한 번이다. 선택지 토큰을 예측하는 위치에서만 출력을 읽으므로 위치 × 어휘 크기의 표를 만들지 "
        "않는다. 실행 중에 텐서의 형태가 바뀌지 않는다. {engine}"),
    "method.compiled": (
        "A decoder layer is compiled once by torch.compile for all layers, and on CUDA a pass is one graph.",
        "디코더 층을 torch.compile로 한 번 컴파일해 모든 층에 쓰고, CUDA에서는 버킷 하나를 그래프 하나로 실행한다."),
    "method.eager": ("In this run the passes were not compiled.", "이 실행에서는 컴파일하지 않았다."),
    "method.chat": (
        "<b>Answers are read off the tree.</b> The listed choices are grafted onto the prompt as branches. One pass "
        "gives the most likely token after every node; walking along them is greedy decoding for as long as the walk "
        "stays in the tree. Where it leaves the tree, ordinary greedy decoding goes on from there. The branches change "
        "the speed and never the answer.",
        "<b>답을 트리에서 읽는다.</b> 프롬프트에 나열된 선택지를 가지로 붙인다. 한 번의 순전파로 모든 노드 다음에 올 "
        "확률이 가장 높은 토큰을 얻으며, 그 토큰을 따라 트리 안에서 내려가는 과정이 곧 그리디 디코딩이다. 트리를 "
        "벗어나면 그 지점부터 일반적인 그리디 디코딩을 이어 간다. 가지는 속도에만 영향을 주고 답은 바꾸지 않는다."),
    "method.answers": (
        "Here {in_tree} of {questions} answers were read in the tree; {decoded} of {tokens} tokens were decoded "
        "outside it.",
        "이 실행에서는 {questions}문항 중 {in_tree}문항의 답을 트리 안에서 읽었고, 생성한 토큰 {tokens}개 중 "
        "{decoded}개를 트리 밖에서 디코딩했다."),
    "method.check": (
        "<b>Checked before it counts.</b> Before the run a small tree goes through the model both ways; a model that "
        "trees cannot compute exactly is refused.",
        "<b>먼저 검증한다.</b> 실행에 앞서 작은 트리를 두 가지 방법으로 계산해 비교하고, 트리로 정확히 계산할 수 없는 "
        "모델은 거부한다."),
    "method.check.compiled": (
        "After compiling, some sequences of a real pass are scored again by the stock model; where they differ, the "
        "pass runs uncompiled and the result says so.",
        "컴파일한 뒤에는 실제 버킷의 일부 시퀀스를 원본 모델로 다시 계산해 비교하고, 다르면 컴파일하지 않고 계산하며 "
        "결과에 그 사실을 남긴다."),
    "method.reference": (
        "This result was computed by the reference engine: every choice, or every chat, alone through the stock "
        "transformers model. It shares nothing and is what other engines are compared with.",
        "이 결과는 기준(reference) 엔진으로 계산했다. 선택지 또는 대화를 하나씩 transformers 원본 모델에 넣었으며, "
        "공유하는 계산이 없다. 다른 엔진의 결과를 이 결과와 비교한다."),
    "figure": ("Figure {figure}. ", "그림 {figure}. "),
    "figure.tree": (
        "{choices} choices as a tree. Solid boxes are computed, with slot, depth and end below; dashed ones are only "
        "predicted. Right: what each query (row) sees, by slot (column).",
        "선택지 {choices}개로 만든 트리. 실선 상자는 계산하는 토큰이며 아래에 순서, 깊이, end를 적었다. 점선 상자는 "
        "예측만 하는 토큰이다. 오른쪽은 각 쿼리(행)가 보는 키(열)이다."),
    "figure.saved": ("Tokens of this run's data, by what is shared.",
                     "이 실행의 데이터에서 무엇을 공유하느냐에 따른 토큰 수."),
    "figure.fill": ("How full the slots of each bucket are.", "버킷별 슬롯 사용률."),
    "figure.phases": ("Time per phase.", "단계별 시간."),
    "tokens.unshared": ("one sequence per choice", "선택지마다 시퀀스 하나"),
    "tokens.question_tree": ("a tree per question", "문항마다 트리 하나"),
    "tokens.slots": ("slots computed, with padding", "패딩을 포함해 계산한 슬롯"),
    "tokens.useful": ("useful tokens computed", "계산한 유효 토큰"),
    "tokens.prefix_tree": ("one tree of all questions, the floor", "전체를 한 트리로 묶은 하한"),
    "fill.bucket": ("{runs} of {rows} × {length}", "{rows} × {length}, {runs}회"),
    "fill.all": ("all buckets", "모든 버킷"),
    # 4
    "measured": ("Measured figures", "측정 결과"),
    "measured.metric": ("metric", "지표"),
    "measured.value": ("value, %", "값(%)"),
    "measured.error": ("standard error", "표준오차"),
    "measured.latency": ("latency", "소요 시간"),
    "measured.covers": ("covers", "포함 범위"),
    "measured.seconds": ("seconds", "초"),
    "measured.total": ("total", "합계"),
    "measured.runs": ("The inference phase ran {runs} times, from {min} to {max} s; its median counts.",
                      "추론 단계를 {runs}회 실행했고({min}–{max}초) 중앙값을 사용했다."),
    "measured.sharing": (
        "{useful} useful tokens in {slots} slots, {fill}\u00a0% filled; {ratio} times fewer tokens than one sequence "
        "per choice, {above}\u00a0% above the floor.",
        "유효 토큰 {useful}개를 슬롯 {slots}개에 담았다(사용률 {fill}%). 선택지마다 시퀀스를 만들 때보다 토큰이 "
        "{ratio}배 적으며 하한보다 {above}% 많다."),
    "measured.bucket": ("bucket, rows × tokens", "버킷(행 × 토큰)"),
    "measured.bucket_runs": ("runs", "실행 횟수"),
    "measured.readouts": ("readouts", "출력 위치"),
    "measured.bucket_fill": ("filled", "사용률"),
    "measured.memory": ("memory", "메모리"),
    "measured.peak": ("peak", "최대 사용량"),
    "measured.predicted": ("predicted before loading", "적재 전 예측"),
    "measured.limit": ("limit", "한도"),
    "measured.comparison": ("comparison with {baseline}", "기준 결과 비교: {baseline}"),
    "measured.drop": ("drop, points", "하락(점)"),
    "measured.interval": ("95 % interval", "95% 구간"),
    "measured.compared": (
        "The same prediction on {agreement} of the questions, {differing} differ; largest difference of a "
        "loglikelihood {largest}; {speed} times as fast.",
        "예측 일치율 {agreement}, 다른 문항 {differing}개, 로그우도의 최대 차이 {largest}, 속도 {speed}배."),
    # 5
    "setting": ("Model, machine and versions", "모델, 장비, 버전"),
    "setting.architecture": ("architecture", "구조"),
    "setting.parameters": ("parameters", "매개변수"),
    "setting.fingerprint": ("fingerprint", "지문"),
    "setting.device_fingerprint": ("on the device", "장치상의 지문"),
    "setting.digest": ("data digest", "데이터 지문"),
    "setting.engine": ("engine, attention", "엔진, 어텐션"),
    "setting.note": ("note", "참고"),
    "setting.cache": ("compile cache", "컴파일 캐시"),
    "setting.system": ("system", "시스템"),
    "setting.cpus": ("{cpus} CPUs", "CPU {cpus}개"),
    # 6
    "credits": ("Open source used", "사용한 오픈소스"),
    "credits.about": (
        "The model and the data are named above and are their authors'; the method is this package's own. Versions are "
        "the run's where it recorded them, else those installed where this document was made.",
        "모델과 데이터의 저작권은 위에 적은 원저작자에게 있다. 버전은 실행 때 기록한 것이고, 기록하지 않은 것은 이 "
        "문서를 만든 환경에 설치된 버전이다."),
    "credits.name": ("name", "이름"),
    "credits.version": ("version", "버전"),
    "credits.licence": ("licence", "라이선스"),
    "credits.font": (
        "This document is set in Pretendard by Kil Hyung-jin, cut down and under another name, as its licence "
        "(SIL Open Font License 1.1) asks.",
        "이 문서의 글꼴은 길형진의 Pretendard(SIL Open Font License 1.1)에서 필요한 글자만 추린 것이며, 라이선스에 "
        "따라 다른 이름을 붙였다."),
    # 7
    "again": ("Reproducing the result", "재현 방법"),
    "again.recorded": ("The command that made this result:", "이 결과를 만든 명령은 다음과 같다."),
    "again.made_up": ("The command was not recorded. One with the same effect, put together from the result:",
                      "실행 명령이 기록되어 있지 않아, 결과에 남은 정보로 같은 내용의 명령을 구성했다."),
    "again.report": ("This document and the card are made by:", "이 문서와 카드는 다음 명령으로 만든다."),
    "again.same": ("The fingerprint and the digest above tell whether model and data are the same.",
                   "모델과 데이터가 같은지는 위의 두 지문으로 확인한다."),
}  # fmt: skip

# By language a context and choices, one token a word, from which the figure of a tree is computed.
EXAMPLES: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    "en": (("A", "man", "sits", "on", "a"), (("red", "roof", "."), ("red", "chair", "."), ("warm", "day", "."))),
    "ko": (("고양이", "가", "따뜻한"),
           (("햇볕", "아래", "존다", "."), ("햇볕", "아래", "논다", "."), ("마루", "에서", "존다", "."))),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Words:
    """The texts of one language."""

    language: str

    def __call__(self, name: str, **fields: object) -> str:
        """The text of the name `name`, with its fields filled in."""
        return TEXTS[name][0 if self.language == "en" else 1].format(**fields)

    def seconds(self, value: float) -> str:
        return self("seconds", value=units.seconds(value))

    def percent(self, fraction: float | None) -> str:
        """A fraction of 1 in percent; None is that of data without labels."""
        return self("no_labels") if fraction is None else self("percent", value=units.percent(fraction))

    def drops(self, drop_points: Mapping[str, float | None]) -> str:
        """The drop of each metric from the baseline's, in points; a dash where there are no labels."""
        known = {name: drop for name, drop in drop_points.items() if drop is not None}
        return ", ".join(self("verdict.drop", metric=name, drop=f"{drop:.2f}") for name, drop in known.items()) or DASH
