"""The words of the strict parser (strict.py), ten languages and more.

In the lists "_" stands for white space. Words of scripts that put no spaces between words have no
boundaries.
"""

import re

LETTERS = r"a-zA-Z\u00c0-\u024f\u0370-\u052f"


def any_of(words: str) -> str:
  """One of the words, as a regular expression."""
  spaced: list[str] = []
  joined: list[str] = []
  for word in sorted(set(words.split()), key=len, reverse=True):
    pattern = re.escape(word).replace("_", r"\s+")
    (spaced if re.match(rf"[{LETTERS}']", word) else joined).append(pattern)
  parts = [rf"(?<![{LETTERS}])(?:{'|'.join(spaced)})(?![{LETTERS}])"] if spaced else []
  return rf"(?:{'|'.join([*parts, *joined])})"


# Before a letter such a word makes it a label: "option A says".
LABEL_NOUN = any_of(
  "letra lettre lettera buchstabe "
  "option choice alternative letter opción opcion alternativa opção opzione variante вариант optie "
  "antwortmöglichkeit möglichkeit proposition 选项 選項 選択肢 옵션 보기"
)
NOUN = any_of(
  "description letter answer answers ans choice option solution response selection pick guess bet "
  "vote verdict conclusion prediction 选项 選項 antwort lösung auswahl wahl réponse reponse choix "
  "respuesta solución opción resposta opção alternativa risposta soluzione opzione scelta ответ "
  "вариант antwoord odpowiedź cevap jawaban 答案 答え 正解 回答 解答 答 选择 選擇 정답 답 답변 "
  "correct_one right_one best_one correct richtig korrekt correcta correcte corretta correcto "
  "certo esatto giusto juist верно правильно правильный правильная"
)
PICK = any_of(
  "应为 應為 应是 應是 meant choose chose choosing pick picked select selected selecting go_with "
  "going_with went_with go_for going_for opt_for opting_for vote_for settle_on settling_on answer "
  "say guess think believe conclude suggest stick_with bet_on lean_toward lean_towards "
  "leaning_toward leaning_towards prefer take leaves leaving left_with leaves_us_with "
  "leaves_me_with leaving_us_with leaving_me_with tip_me_toward lean push_me_toward "
  "push_me_towards pushes_me_toward pushes_me_towards steers_me_to nudges_me_toward "
  "nudges_me_towards tip_me_towards tips_me_toward tips_me_towards lean_me_toward leans_toward "
  "leans_towards points_toward points_towards points_me_to brings_me_to leads_me_to favors "
  "favours leaves_only leaving_only points_to narrows_down_to wähle nehme denke glaube tippe_auf "
  "entscheide_mich_für entscheide_mich_fuer würde choisis choisirais pense crois opte_pour dirais "
  "elijo escojo selecciono creo diría opto_por escolho acho scelgo penso direi выбираю думаю 选择 "
  "選擇 应选 應選 故选 故選 选 選 认为 認為 觉得 覺得"
)
COPULAS = (
  "is are was were be 's isn’t would_be will_be must_be should_be has_to_be have_to_be "
  "can_only_be seems seem appears appear looks remains ist sind wäre lautet est sont serait es "
  "son sería é são è sono это 是 为 為 は が 은 는 이 가"
)
FILLERS = (
  "fully completely entirely absolutely totally perfectly number it's that's a o il giusta it "
  "that this the to be would should must will has have here for me my question in case only just "
  "simply clearly definitely therefore thus hence then so most likely probably indeed really "
  "actually certainly surely obviously undoubtedly option choice letter answer one correct right "
  "best final i we you its can safely confidently die der das den dem antwort richtige korrekte "
  "klar wohl also daher sicher dass es la le les l' un une bonne réponse correcte que qu' c'est "
  "donc clairement el lo respuesta correcta opción esatta giusta exacte adéquate acertada exacta "
  "adecuada exata juiste goede верный верная правильная la_opción claramente por_tanto a_opção "
  "a_alternativa resposta certa correta la_risposta corretta che вариант правильный 应该 應該 应 "
  "應 就 只能 最も 一番 选项 選項 最 明显 明確 的 に なり ます 选 選"
)
BE = any_of(COPULAS)
FILL = rf"(?:\s*(?:{any_of(FILLERS + ' ' + COPULAS)}|[:=,>\-–—→\]])){{0,12}}+\s*"
# "(B) is what the frames show", and what is said to be right in a word.
RIGHT = (
  r"(?:what\s+(?:(?!not\b)[a-z]+\s+){1,4}?(?:supports?|shows?|suggests?|indicates?)(?![\w'])|"
  + any_of(
    "the_only_one only_one the_only_option the_only supported consistent selected chosen choice "
    "pick what_i one_i option_i choice_i closer_to_the_truth closer_to_what correct right true "
    "accurate the_answer answer best_answer best_choice best_option best_match best_fit best "
    "most_likely most_plausible most_probable most_accurate most_appropriate most_reasonable "
    "most_sensible most_suitable most_fitting most_logical most_consistent most_convincing "
    "most_natural most_relevant most_precise most_correct most_credible more_reasonable "
    "more_sensible more_suitable more_fitting more_logical more_convincing safest best_supported "
    "likeliest closest the_closest the_one valid yes better more_accurate more_likely "
    "more_plausible richtig korrekt zutreffend wahr die_richtige_antwort die_antwort die_beste "
    "juste vraie vrai exacte exact bonne la_bonne_réponse la_réponse correcta correcto verdadera "
    "cierta la_respuesta acertada certa correta verdadeira giusta corretta esatta верно верный "
    "верен верна верная правильна правильная esatto giusto corretto correto certo juist "
    "правильный правильно 正确 正確 对的 對的 最合适 最合適 最符合 符合 最佳 正しい 正解 適切 "
    "です だ 맞 정답 입니다 ✅ ✓ ✔ ☑"
  )
  + ")"
)
NOT = any_of(
  "no_way not never none_of neither nor isn't wasn't aren't can't cannot can_not couldn't "
  "shouldn't wouldn't won't mustn't ain't rather_than instead_of except except_for excluding "
  "exclude excludes excluded eliminate eliminates eliminated eliminating rule_out rules_out "
  "ruled_out ruling_out reject rejected rejecting discard discarded dismiss dismissed don't_think "
  "doesn't_think do_not_think don't_believe do_not_believe doubt against nicht kein keine weder "
  "noch statt anstatt anstelle_von außer pas plutôt_que au_lieu_de et_non sauf ni excepté no_es "
  "no_la en_lugar_de en_vez_de y_no excepto não em_vez_de e_não non_è non_la invece_di e_non не "
  "不是 不选 不選 不应 不應 不会是 不能 不可 不可以 不该 不應該 不宜 并非 並非 而非 而不是 排除 "
  "除了"
)
THAN = any_of("than other_than opposed_to over unlike als que più_di чем")
WRONG = any_of(
  "정답이_아 답이_아 正解では wrong incorrect false untrue inaccurate invalid unlikely "
  "less_likely implausible impossible out excluded eliminated rejected discarded dismissed "
  "unsupported irrelevant mistaken misleading inconsistent neither a_distractor distractor n't "
  "isn't wasn't aren't weren't won't wouldn't can't cannot can_not doesn't don't didn't couldn't "
  "shouldn't does_not do_not did_not has_no have_no lacks lack fails fail contradicts contradict "
  "conflicts misses ignores ruled_out falsch inkorrekt unzutreffend scheidet kann_nicht faux "
  "fausse incorrecte inexacte exclue n'est incorrecta incorrecto falsa falso errónea erronea "
  "descartada errada incorreta sbagliata errata scorretta неверно неверный неправильно "
  "неправильный неверен неверна неверная неправильна неправильная ошибочен ошибочна ошибочный "
  "errato scorretto sbagliato erronée erroné errónea erróneo errado incorreto onjuist fout 错误 "
  "錯誤 错的 錯的 错 不正确 不正確 不合理 不合适 不合適 不准确 不準確 不恰当 不恰當 不对 不對 "
  "不符 不可能 有误 有誤 排除 不成立 ではなく ではない じゃない ではありません では_ありません "
  "誤り 間違い 間違って 違います 違う 不正解 正しくない 正しくありません 不適切 아니 아닙 틀 오답 "
  "❌ ✗ ✘ ✖ ❎"
)
NEGATED = any_of("not never nicht pas no_es non_è não не 不是 没有 沒有")
BAD = any_of(
  "wrong incorrect false worst least bad eliminated rejected excluded falsche incorrecte "
  "mauvaise incorrecta errada sbagliata 错误 錯誤 誤り"
)
SOME = any_of(
  "one another other possible first second third alternative previous initial original tempting "
  "andere autre otra outra altra 另一个 另一個 別の"
)
SO = any_of(
  "ergo "
  "so therefore thus hence consequently accordingly finally overall ultimately but instead "
  "rather daher deshalb somit folglich sondern donc ainsi mais sino luego entonces portanto mas "
  "quindi ma perciò следовательно поэтому а 因此 所以 故 而是 故此 よって したがって 따라서"
)
AND = (
  r"(?:\s*,?\s*(?:"
  + any_of("and or nor und oder et ou y o e и или 和 或 与 と や か 还是 還是")
  + r"|\s*[&/+、])\s*)"
)
HEDGE = (
  any_of(
    "most_people many_people many_would others_would "
    "otherwise might may could perhaps maybe possibly plausible possible potentially whether "
    "between tempting tempted thought almost initially at_first first_glance partially partly "
    "some_people some_would one_might some_say also considered considering consider compare "
    "comparing versus vs torn unsure könnte vielleicht möglicherweise zwischen peut-être pourrait "
    "entre quizás quizá podría talvez poderia forse potrebbe может возможно 可能 也许 也許 或许 "
    "介于 かもしれ 可能性"
  )
  + r"(?<!most\splausible)"
)
SAYS = any_of(
  "says say states mentions describes shows suggests implies refers claims involves talks "
  "depicts contains includes focuses might could may also"
)
IF = any_of("if unless assuming depending depends suppose wenn falls 如果 假如 もし")
FIRM_IF = re.compile(
  r"\b(?:even|as)\s+if\b|\bif\s+(?:i|we|you|one)\s+(?:had|have|must|were|was|am|need|look|watch"
  r"|consider|see|observe|examine)\b|\bif\s+(?:forced|anything|necessary|pressed|you(?:'re|\s+are)\s+asking)\b",
  re.I,
)
BECAUSE = any_of(
  "because since as while whereas than like unlike for given due although though where when "
  "that which weil da während "
  "car_il car_elle car_on car_l' car_la car_le car_les parce puisque tandis porque ya_que "
  "pois perché потому 因为 因為 由于 なぜなら から 왜냐하면"
)
NEGATION = any_of(
  "not no never without neither nor none nothing n't cannot isn't wasn't aren't don't doesn't "
  "didn't can't couldn't rather_than instead_of unlike wrong incorrect false nicht kein keine "
  "keinen ohne falsch pas sans ni aucun aucune sin não sem non senza не нет 不 没 沒 無 ない "
  "ません 아니 없"
)
REASONING = r"think|thinking|thought|thoughts|reasoning|analysis|scratchpad|rationale|reflection"
_SEEMS = (
  "seems seem appears appear looks leaves leaving left_with narrows_down_to points_to scheint "
  "semble parece sembra кажется"
)
SEEMS = re.compile(any_of(_SEEMS), re.I)
FINAL = re.compile(
  any_of("final endgültige endgültig finale finalmente 最终 最終 最后 最後 최종"), re.I
)
