"""The choice of `auto` by hand-made rates: no lane, no clock, no hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitwiser_lab.engine.controller import Candidate, Line, Load, Rates, Shares, decide, predict
from splitwiser_lab.engine.rates import RateBook
from splitwiser_lab.timeline import Span

TURNS = Candidate("sequential", "turns")
CHUNKED = Candidate("chunked", "mixed", {"chunk_tokens": 512})
HALF = Candidate("partitioned", "split", {"decode_sms": 64}, Shares(0.5, 0.8))
QUARTER = Candidate("partitioned", "split", {"decode_sms": 32}, Shares(0.7, 0.4))
ALL = (TURNS, CHUNKED, HALF, QUARTER)
# 200,000 prompt tokens/s; a decode step of 1 ms and 10 µs for each sequence.
RATES = Rates(Line(0.0, 5e-6), Line(1e-3, 1e-5))
BOTH = Load(decoding=32, waiting=1, prefill_tokens=2000)


def measured(**shares: Shares) -> Rates:
    labels = {"chunked": CHUNKED.label, "half": HALF.label, "quarter": QUARTER.label}
    return Rates(RATES.prefill, RATES.decode, {labels[name]: share for name, share in shares.items()})


class TestPrediction:
    def test_taking_turns_stalls_decode_for_the_whole_prefill(self) -> None:
        found = predict(TURNS, RATES, BOTH)
        assert found.gap_ms == pytest.approx(2000 * 5e-3 + 1.32) and found.worth == 1
        assert found.prefill_tok_s == pytest.approx(200_000)

    def test_a_stall_that_has_begun_counts(self) -> None:
        later = replace(BOTH, stalled=0.004)
        assert predict(TURNS, RATES, later).gap_ms == pytest.approx(predict(TURNS, RATES, BOTH).gap_ms + 4)
        assert predict(HALF, RATES, later).gap_ms == predict(HALF, RATES, BOTH).gap_ms, "decode goes on there"
        assert decide(ALL, RATES, BOTH, TURNS, itl_limit_ms=25).choice == TURNS
        assert decide(ALL, RATES, later, TURNS, itl_limit_ms=25).choice != TURNS

    def test_a_split_slows_the_step_down_by_its_share(self) -> None:
        found = predict(HALF, RATES, BOTH)
        assert found.gap_ms == pytest.approx(2 * 1.32 / 0.8), "the step that a new request just missed, and its own"
        assert found.prefill_tok_s == pytest.approx(100_000)
        assert not found.measured and predict(HALF, measured(half=Shares(0.4, 0.9)), BOTH).measured

    def test_of_mixed_batches_times_are_expected_to_add_up(self) -> None:
        found = predict(CHUNKED, RATES, BOTH)
        assert found.shares.gain == pytest.approx(1.0) and found.gap_ms == pytest.approx(1.32 + 480 * 5e-3)

    def test_a_token_decoded_early_is_worth_its_part_of_a_fuller_step(self) -> None:
        steady, start = predict(HALF, RATES, BOTH), predict(HALF, RATES, Load(2, 30, 60_000))
        assert steady.worth == pytest.approx(0.5 + 0.8 * (1.33 * 32 / 33) / 1.32)
        assert start.worth == pytest.approx(0.5 + 0.8 * (1.32 * 2 / 32) / 1.02) and start.worth < 1
        alone = predict(HALF, RATES, Load(2, 30, 60_000, joining=0))
        assert alone.worth == pytest.approx(0.5 + 0.8), "those that wait write one token each: no step gets fuller"

    def test_decode_counts_for_no_more_than_there_is_to_decode(self) -> None:
        """2,000 prompt tokens take 10 ms; a token in a full batch of 33 costs 40 µs."""
        few, many = (predict(HALF, RATES, replace(BOTH, decode_tokens=n)).worth for n in (25, 5000))
        assert few == pytest.approx(0.5 + 0.5 * 25 * 1.33e-3 / 33 / 10e-3) and few < 1
        assert many == predict(HALF, RATES, BOTH).worth

    def test_a_measured_pause_counts_more_than_the_mean(self) -> None:
        found = predict(HALF, measured(half=Shares(0.5, 0.8, pause=6.0)), BOTH)
        assert found.gap_ms == pytest.approx(6 * 1.32)


class TestDecision:
    def test_a_cold_start_takes_turns_and_says_so(self) -> None:
        found = decide(ALL, Rates(decode=RATES.decode), BOTH, TURNS)
        assert found.choice == TURNS and "prefill alone is not measured yet" in found.reason

    def test_prompts_that_wait_do_not_keep_decode_from_its_first_turn(self) -> None:
        found = decide(ALL, Rates(prefill=RATES.prefill), BOTH, TURNS)
        assert found.choice == CHUNKED and "decode alone is not measured yet" in found.reason
        assert decide(ALL, Rates(prefill=RATES.prefill), replace(BOTH, decoding=0), TURNS).choice == TURNS
        assert decide((TURNS, HALF), Rates(prefill=RATES.prefill), BOTH, TURNS).choice == TURNS

    def test_overlap_is_chosen_where_it_pays(self) -> None:
        found = decide(ALL, RATES, BOTH, TURNS)
        assert found.choice == HALF and "1.2" in found.reason and "overlap gain 1.30" in found.reason
        assert len(found.predictions) == 4

    def test_taking_turns_stays_where_overlap_loses(self) -> None:
        losing = measured(half=Shares(0.4, 0.5), quarter=Shares(0.6, 0.3), chunked=Shares(0.6, 0.3))
        assert decide(ALL, losing, BOTH, TURNS).choice == TURNS
        assert "taking turns" in decide(ALL, losing, BOTH, TURNS).reason

    def test_prompts_that_all_wait_at_once_are_prefilled_first(self) -> None:
        assert decide(ALL, RATES, Load(2, 30, 60_000), TURNS).choice == TURNS

    def test_the_limit_rules_out_what_breaks_it(self) -> None:
        losing = measured(half=Shares(0.4, 0.5), quarter=Shares(0.6, 0.3), chunked=Shares(0.6, 0.3))
        found = decide(ALL, losing, BOTH, TURNS, itl_limit_ms=6.0)
        assert found.choice in (HALF, QUARTER, CHUNKED), "turns would stall decode for 11 ms"
        assert "taking turns would stall decode for 11.3 ms" in found.reason
        assert decide(ALL, losing, BOTH, TURNS, itl_limit_ms=5.0).choice == CHUNKED, "the only one within 5 ms"

    def test_a_limit_that_nothing_keeps_gets_what_comes_closest(self) -> None:
        found = decide(ALL, RATES, BOTH, TURNS, itl_limit_ms=0.5)
        assert found.choice == HALF and "no choice keeps" in found.reason and "closest with 3.3 ms" in found.reason

    def test_a_small_promise_changes_nothing(self) -> None:
        near = measured(half=Shares(0.5, 0.78), quarter=Shares(0.8, 0.5))
        assert decide(ALL, near, BOTH, HALF).choice == HALF, "1.3 against 1.28"
        better = measured(half=Shares(0.5, 0.6), quarter=Shares(0.8, 0.5))
        assert decide(ALL, better, BOTH, HALF).choice == QUARTER

    def test_what_runs_is_left_only_when_it_loses(self) -> None:
        barely = measured(half=Shares(0.45, 0.58), quarter=Shares(0.4, 0.3), chunked=Shares(0.6, 0.3))
        assert decide(ALL, barely, BOTH, HALF).choice == HALF and decide(ALL, barely, BOTH, TURNS).choice == TURNS
        loses = measured(half=Shares(0.40, 0.50), quarter=Shares(0.4, 0.3), chunked=Shares(0.6, 0.3))
        assert decide(ALL, loses, BOTH, HALF).choice == TURNS

    def test_under_a_limit_a_short_queue_wants_its_first_tokens_soon_and_a_long_one_the_most_worth(self) -> None:
        short, long = BOTH, Load(decoding=32, waiting=30, prefill_tokens=60_000)
        shares = measured(half=Shares(0.5, 0.8), quarter=Shares(0.7, 0.4), chunked=Shares(0.6, 0.4))
        assert decide(ALL, shares, short, TURNS, itl_limit_ms=10).choice == QUARTER, "prefill at 0.7"
        assert decide(ALL, shares, short, TURNS, itl_limit_ms=25).choice == TURNS, "its stall of 11 ms is allowed"
        assert decide(ALL, shares, short, TURNS, itl_limit_ms=15).choice == QUARTER, "another prompt may come meanwhile"
        assert decide(ALL, shares, long, TURNS, itl_limit_ms=10).choice == HALF
        assert decide(ALL, shares, short, TURNS).choice == HALF, "without a limit, throughput"

    def test_lanes_that_divide_nothing_can_stay_when_one_phase_is_alone(self) -> None:
        whole = replace(HALF, divides=False)
        for load in (Load(8, 0, 0), Load(0, 2, 500)):
            assert decide((TURNS, whole), RATES, load, whole).choice == whole
            assert decide((TURNS, HALF), RATES, load, HALF).choice == TURNS

    def test_one_phase_alone_gets_the_whole_device(self) -> None:
        only_decode, only_prefill = Load(8, 0, 0), Load(0, 2, 500)
        assert decide(ALL, RATES, only_decode, HALF).choice == TURNS
        assert decide(ALL, RATES, only_decode, CHUNKED).choice == CHUNKED, "it has the whole device already"
        assert decide(ALL, RATES, only_prefill, HALF).choice == TURNS
        assert decide(ALL, RATES, Load(0, 0, 0), HALF).choice == HALF, "nothing to do is no reason to change"

    def test_there_must_be_something_to_fall_back_to(self) -> None:
        with pytest.raises(ValueError, match="must take turns"):
            decide((HALF,), RATES, BOTH, HALF)

    def test_a_prediction_reads_as_a_sentence_with_numbers(self) -> None:
        text = str(predict(HALF, measured(half=Shares(0.5, 0.8)), BOTH))
        assert text.startswith("partitioned (decode_sms=64): prefill at 0.50 of its rate alone (100,000 tok/s)")
        assert "(measured)" in text and "longest gap between two tokens 3.3 ms" in text


def prefill(start: float, seconds: float, tokens: int) -> Span:
    return Span("prefill", "prefill", start, start + seconds, tokens, 0, 1, "auto")


def decode(start: float, seconds: float, sequences: int) -> Span:
    return Span("decode", "decode", start, start + seconds, 0, sequences, sequences, "auto")


class TestRateBook:
    @pytest.fixture
    def book(self) -> RateBook:
        """Knows both phases alone: 1 ms for 100 prompt tokens, 2 ms and 0.1 ms for each sequence a step."""
        book = RateBook()
        for number in range(12):
            book.learn(prefill(number, 0.01, 1000), TURNS)
            book.learn(prefill(number, 0.001, 100), TURNS)
            for sequences in (10, 40):
                book.learn(decode(number + 0.5, 0.002 + sequences * 1e-4, sequences), TURNS)
        return book

    def test_nothing_is_known_at_first(self) -> None:
        assert RateBook().rates(0.0) == Rates()

    def test_lines_go_through_what_was_seen(self, book: RateBook) -> None:
        rates = book.rates(20.0)
        assert rates.prefill and rates.prefill.at(500) == pytest.approx(0.005)
        assert rates.decode and rates.decode.at(20) == pytest.approx(0.004)

    def test_a_slow_first_batch_does_not_count(self, book: RateBook) -> None:
        slow = RateBook()
        slow.learn(prefill(0, 3.0, 1000), TURNS)
        for number in range(3):
            slow.learn(prefill(number + 5, 0.01, 1000), TURNS)
        rates = slow.rates(9.0)
        assert rates.prefill and rates.prefill.at(1000) == pytest.approx(0.01)

    def test_one_size_alone_is_proportional_for_prefill_and_flat_for_decode(self) -> None:
        book = RateBook()
        book.learn(prefill(0, 0.01, 1000), TURNS)
        book.learn(decode(1, 0.004, 8), TURNS)
        rates = book.rates(2.0)
        assert rates.prefill and rates.prefill.at(500) == pytest.approx(0.005)
        assert rates.decode and rates.decode.at(16) == pytest.approx(0.004)

    def overlap(self, book: RateBook, start: float, candidate: Candidate = HALF) -> None:
        """A prefill of 1000 tokens in 20 ms (alone 10), beside it four steps of 10 sequences in 5 ms (alone 3)."""
        for number in range(4):
            book.learn(decode(start + number * 0.005, 0.005, 10), candidate)
        book.learn(prefill(start, 0.02, 1000), candidate)

    def test_shares_come_from_decode_steps_beside_a_prefill(self, book: RateBook) -> None:
        self.overlap(book, 30.0)
        assert HALF.label not in book.rates(31.0).shares, "the first is not trusted: much was made for it"
        self.overlap(book, 31.0)
        self.overlap(book, 32.0)
        share = book.rates(33.0).shares[HALF.label]
        assert share.prefill == pytest.approx(0.5) and share.decode == pytest.approx(0.6)
        assert share.pause == pytest.approx(5 / 3)

    def test_a_pause_between_two_steps_is_noted(self, book: RateBook) -> None:
        """Of 20 ms the second step waits 9: its token comes 12 ms after the first's, where a step alone takes 3."""
        for start in (30.0, 31.0, 32.0):
            for at, seconds in ((0.0, 0.003), (0.012, 0.003), (0.0151, 0.003)):
                book.learn(decode(start + at, seconds, 10), HALF)
            book.learn(prefill(start, 0.02, 1000), HALF)
        assert book.rates(33.0).shares[HALF.label].pause == pytest.approx(4.0)

    def test_of_pauses_the_longest_of_late_counts(self, book: RateBook) -> None:
        """As a long prompt on a stream of its own makes them; medians of the shares as ever."""
        for start, step in ((30.0, 0.005), (31.0, 0.005), (32.0, 0.009), (33.0, 0.005)):
            for at in (0.0, step, 2 * step):
                book.learn(decode(start + at, step, 10), HALF)
            book.learn(prefill(start, 0.02, 1000), HALF)
        share = book.rates(34.0).shares[HALF.label]
        assert share.decode == pytest.approx(0.6) and share.pause == pytest.approx(3.0)

    def test_a_prefill_with_little_decode_beside_it_tells_nothing(self, book: RateBook) -> None:
        for start in (30.0, 31.0, 32.0, 33.0):
            book.learn(decode(start + 0.001, 0.005, 10), HALF)
            book.learn(prefill(start, 0.02, 1000), HALF)
        assert not book.rates(34.0).shares

    def test_decode_alone_in_a_split_is_not_the_rate_alone(self, book: RateBook) -> None:
        before = book.rates(30.0).decode
        for number in range(20):
            book.learn(decode(30 + number, 0.9, 10), HALF)
        assert book.rates(60.0).decode == before

    def test_mixed_batches_give_shares_of_both(self, book: RateBook) -> None:
        for number in range(4):
            book.learn(Span("main", "mixed", 30 + number, 30.01 + number, 500, 10, 11, "auto"), CHUNKED)
        share = book.rates(40.0).shares[CHUNKED.label]
        assert share.prefill == pytest.approx(0.5) and share.decode == pytest.approx(0.3)

    def test_old_shares_are_forgotten_so_that_a_loser_gets_another_chance(self, book: RateBook) -> None:
        for start in (30.0, 31.0, 32.0):
            self.overlap(book, start)
        assert HALF.label in book.rates(60.0).shares and HALF.label not in book.rates(600.0).shares
