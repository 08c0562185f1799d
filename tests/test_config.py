"""TierConfig: what it refuses, the policy it takes by name or as a value, and settings in a file."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import pytest

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig, tier_config, tiers_as_plain, tiers_from_file
from tieredkv.errors import BudgetError, OptionError
from tieredkv.policy.presets import POLICIES


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_kv_gb", 0), ("gpu_kv_gb", -1), ("gpu_kv_gb", float("nan")), ("gpu_kv_gb", "4"), ("gpu_kv_gb", 1e308),
     ("gpu_kv_gb", True), ("host_kv_gb", 0), ("host_kv_gb", "1")],
)  # fmt: skip
def test_a_memory_size_out_of_range_is_a_budget_error(name, value):
    with pytest.raises(BudgetError, match=f"{name}=.* is not valid: give"):
        TierConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("budget_ratio", "1"), ("budget_ratio", 0), ("chunk_tokens", 0), ("chunk_tokens", 3.5), ("chunk_tokens", True),
     ("spare_ratio", 1.0), ("spare_ratio", "x"), ("recent_window", -1), ("encode_batch", 0), ("encode_batch", 1.5),
     ("adaptive", "no"), ("prefetch", 0), ("host_kv_bits", 5), ("host_kv_bits", 8.0), ("host_kv_bits", True),
     ("host_kv_bits", "8"), ("step_overhead", -0.1), ("step_overhead", float("nan")), ("step_overhead", "0.1"),
     ("link_gb_s", 0), ("link_gb_s", float("inf")), ("link_gb_s", 1e9), ("link_gb_s", "25")],
)  # fmt: skip
def test_another_setting_out_of_range_is_an_option_error(name, value):
    with pytest.raises(OptionError, match=f"{name}=.* is not valid: give"):
        TierConfig(**{name: value})


def test_other_bits_are_refused_with_the_choices():
    with pytest.raises(OptionError, match=r"host_kv_bits=6 is not valid: give None or one of 16, 8, 4\."):
        TierConfig(host_kv_bits=6)
    assert [TierConfig(host_kv_bits=bits).host_kv_bits for bits in (None, 16, 8, 4)] == [None, 16, 8, 4]


def test_no_limit_on_copies_is_none_or_infinity():
    assert TierConfig().step_overhead == 0.15
    unlimited = [TierConfig(step_overhead=none).step_overhead for none in (None, float("inf"))]
    assert [*unlimited, tier_config(None, {"step_overhead": None, "gpu_kv_gb": None}).step_overhead] == [None] * 3


def test_a_policy_is_a_name_or_a_policy_and_after_that_a_policy():
    assert tieredkv.TierConfig().policy is POLICIES["hybridkv"]
    assert tieredkv.TierConfig(policy="quest") == tieredkv.TierConfig(policy=POLICIES["quest"])
    assert len({tieredkv.TierConfig(policy=one) for one in ("quest", POLICIES["quest"], "snapkv")}) == 2


def test_a_changed_policy_leaves_its_preset_as_it_is():
    changed = replace(POLICIES["quest"], digest="mean")
    policy = replace(tieredkv.TierConfig(policy="snapkv"), policy=changed).policy
    assert (policy.digest, policy.dense_layers, policy.theta) == ("mean", 2, 2.0)
    assert POLICIES["quest"].digest == "minmax"


@pytest.mark.parametrize("value", ["none", None, 3])
def test_an_unknown_policy_is_refused_with_the_known_names(value):
    with pytest.raises(OptionError, match=f"policy={value!r} is not valid: give one of hybridkv, paper"):
        tieredkv.TierConfig(policy=value)


def test_a_field_of_the_policy_given_as_an_option_is_refused_with_the_way_to_change_it(llama):
    with pytest.raises(OptionError, match=r"give policy=replace\(POLICIES\['quest'\], theta=\.\.\.\)"):
        TieredCache(llama.config, policy="quest", theta=0.9)
    for call in (tieredkv.open_session, tieredkv.load_session):
        with pytest.raises(OptionError, match=r"replace\(POLICIES\['hybridkv'\], stay="):
            call("model", "video", stay=2.0)
    with pytest.raises(OptionError, match=r"rank=POLICIES\['snapkv'\]\.rank\)"):
        tieredkv.generate("model", "video", "what ?", pruning="snapkv")


# ---- in a file

CHANGED = [
    "quest",
    replace(POLICIES["hybridkv"], theta=0.5, digest_bits=8),
    replace(POLICIES["quest"], rank=POLICIES["snapkv"].rank, merge=POLICIES["lookm"].merge),
    replace(POLICIES["lookm"], merge=None, summary="Not merged."),
    replace(POLICIES["hybridkv"], name="mine", stay=3.0),
]


@pytest.mark.parametrize("policy", CHANGED, ids=range(len(CHANGED)))
def test_settings_come_back_from_a_file_as_they_were(policy):
    tiers = TierConfig(policy=policy, gpu_kv_gb=0.25, budget_ratio=0.5, encode_batch=64, host_kv_bits=4)
    tiers = replace(tiers, step_overhead=float("inf"), link_gb_s=12.5)
    assert tiers_from_file(json.loads(json.dumps(tiers_as_plain(tiers)))) == tiers
    assert pickle.loads(pickle.dumps(tiers)) == tiers


def test_a_file_stores_the_fields_in_which_a_policy_differs_from_its_preset():
    assert tiers_as_plain(TierConfig())["policy"] == {"preset": "hybridkv"}
    changed = replace(POLICIES["paper"], theta=0.5, rank=POLICIES["snapkv"].rank)
    assert tiers_as_plain(TierConfig(policy=changed))["policy"] == {"preset": "paper", "rank": "snapkv", "theta": 0.5}


OLD_FIELDS = (
    "head_score", "theta", "top_k_ratio", "text_window", "score_group", "type_split", "static_weight", "static_floor",
    "dynamic_floor", "saliency_window", "saliency_pool", "pruning", "digest", "digest_bits", "chunk_group", "stay",
    "dense_layers", "reuse_above",
)  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "given"),
    [
        ("hybridkv", {}),
        ("quest", {"digest": "mean", "dense_layers": 1}),
        ("paper", {"theta": 0.5, "pruning": "lookm"}),
    ],
)
def test_settings_of_a_file_from_before_policies_were_values_are_read(policy, given):
    plain = {name: value for name, value in asdict(TierConfig()).items() if name != "policy"}
    plain |= {"gpu_kv_gb": 0.25, "policy": policy, **dict.fromkeys(OLD_FIELDS), **given}
    changes = {name: value for name, value in given.items() if name != "pruning"}
    if "pruning" in given:
        changes |= {"rank": POLICIES["lookm"].rank, "merge": POLICIES["lookm"].merge}
    assert tiers_from_file(plain) == TierConfig(gpu_kv_gb=0.25, policy=replace(POLICIES[policy], **changes))


def test_a_policy_with_a_function_of_the_users_own_must_be_given_again():
    def rank(tokens):
        return tokens.saliency

    tiers = TierConfig(policy=replace(POLICIES["snapkv"], name="mine", rank=rank))
    plain = json.loads(json.dumps(tiers_as_plain(tiers)))
    with pytest.raises(
        OptionError, match="the saved policy 'mine' uses its own rank function, which is not in the file"
    ):
        tiers_from_file(plain)
    assert tiers_from_file(plain, tiers.policy) == tiers
    assert tiers_from_file(plain, "quest").policy is POLICIES["quest"]


def test_a_policy_or_preset_that_is_not_known_here_is_refused():
    for stored in ("later", {"preset": "later"}, {"preset": "hybridkv", "digest": "later"}):
        with pytest.raises(OptionError, match="'later' is not valid: give"):
            tiers_from_file({**tiers_as_plain(TierConfig()), "policy": stored})
    with pytest.raises(OptionError, match="policy='' is not valid: give"):
        tiers_from_file({**tiers_as_plain(TierConfig()), "policy": {"theta": 0.5}})


def test_what_a_later_version_adds_is_ignored():
    plain = tiers_as_plain(TierConfig(policy="quest"))
    plain["policy"]["added_later"] = plain["added_later"] = 1
    assert tiers_from_file(plain) == TierConfig(policy="quest")
