"""The estimators by scikit-learn's own checks, and in its company."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import vbdl

QUICK = {"n_members": 2, "hidden": (16,), "epochs": 30, "random_state": 0}
# more than a second each: they fit many times
SLOW = {
    "check_classifiers_train", "check_classifiers_classes", "check_regressors_train", "check_fit_score_takes_y",
    "check_methods_sample_order_invariance", "check_methods_subset_invariance", "check_estimators_dtypes",
    "check_classifiers_one_label", "check_supervised_y_2d", "check_n_features_in_after_fitting",
    "check_regressors_int", "check_dict_unchanged", "check_fit_idempotent", "check_readonly_memmap_input",
    "check_dont_overwrite_attributes", "check_estimators_fit_returns_self", "check_estimators_overwrite_params",
    "check_regressor_data_not_an_array", "check_classifier_data_not_an_array", "check_estimators_pickle",
    "check_regressors_no_decision_function", "check_positive_only_tag_during_fit", "check_f_contiguous_array_estimator",
}  # fmt: skip


def checks():
    for estimator in (vbdl.VBDLClassifier(**QUICK), vbdl.VBDLRegressor(**QUICK)):
        for instance, check in estimator_checks_generator(estimator):
            name = check.func.__name__
            marks = [pytest.mark.slow] if name in SLOW else []
            options = ",".join(f"{k}={v}" for k, v in check.keywords.items())
            yield pytest.param(instance, check, id=f"{type(estimator).__name__}-{name}({options})", marks=marks)


@pytest.mark.parametrize("estimator, check", list(checks()))
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return train_test_split(x, np.array(["malignant", "benign"])[y], test_size=0.3, random_state=0, stratify=y)


def test_probabilities_are_as_good_as_a_logistic_regressions(cancer):
    x, x_test, y, y_test = cancer
    found = vbdl.VBDLClassifier(random_state=0, epochs=60).fit(x, y)
    line = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    assert found.score(x_test, y_test) > 0.94
    ours, theirs = (log_loss(y_test, m.predict_proba(x_test), labels=found.classes_) for m in (found, line))
    assert ours < theirs + 0.05
    parts = found.predict_uncertainty(x_test)
    assert np.allclose(parts["total"], parts["aleatoric"] + parts["epistemic"], atol=1e-6)
    assert (parts["epistemic"] >= 0).all() and parts["epistemic"].mean() > 1e-3


@pytest.mark.parametrize("method", ["deep-ensemble", "mc-dropout", "mean-field"])
def test_a_std_that_holds_the_truth_as_often_as_it_says(method):
    x, y = load_diabetes(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.3, random_state=0)
    found = vbdl.VBDLRegressor(method=method, random_state=0, epochs=80, n_samples=32).fit(x, y)
    mean, std = found.predict(x_test, return_std=True)
    assert found.score(x_test, y_test) > RidgeCV().fit(x, y).score(x_test, y_test) - 0.12
    assert 0.82 < (np.abs(mean - y_test) < 1.645 * std).mean() < 0.98
    low, high = found.predict_interval(x_test, 0.9)
    assert (low < mean).all() and (mean < high).all()
    assert np.allclose(found.predict_uncertainty(x_test)["total"], std**2, rtol=1e-4)


def test_a_seed_is_a_model_and_a_pickle_predicts_the_same(cancer):
    x, x_test, y, _ = cancer
    a = vbdl.VBDLClassifier(**QUICK).fit(x, y)
    b = clone(a).fit(x, y)
    again = pickle.loads(pickle.dumps(a))
    assert np.array_equal(a.predict_proba(x_test), b.predict_proba(x_test))
    assert np.array_equal(a.predict_proba(x_test), again.predict_proba(x_test))
    other = clone(a).set_params(random_state=1).fit(x, y)
    assert not np.array_equal(a.predict_proba(x_test), other.predict_proba(x_test))


def test_in_pipelines_and_searches(cancer):
    x, _, y, _ = cancer
    small = vbdl.VBDLClassifier(**{**QUICK, "epochs": 3})
    assert cross_val_score(make_pipeline(StandardScaler(), small), x[:120], y[:120], cv=2).min() > 0.6
    search = GridSearchCV(small, {"lr": [1e-2, 1e-4]}, cv=2).fit(x[:120], y[:120])
    assert search.best_params_ == {"lr": 1e-2}


def test_the_predictor_can_be_calibrated(cancer):
    x, x_test, y, y_test = cancer
    found = vbdl.VBDLClassifier(**QUICK).fit(x, y)
    rows, labels = found._tensor(x_test), np.searchsorted(found.classes_, y_test)
    calibrated = vbdl.calibrate(found.predictor_, (rows[:80], labels[:80]), vbdl.ConformalSets(alpha=0.1))
    assert calibrated(rows[80:]).sets.shape == (len(y_test) - 80, 2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"method": "magic"}, "magic"),
        ({"hidden": (8, 9)}, "equal widths"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"patience": 0}, "patience"),
    ],
)
def test_parameters_that_make_no_sense(cancer, options, said):
    x, _, y, _ = cancer
    with pytest.raises(ValueError, match=said):
        vbdl.VBDLClassifier(**options).fit(x, y)
    with pytest.raises(ValueError, match="noise"):
        vbdl.VBDLRegressor(noise="loud").fit(x, np.arange(len(x)))
    with pytest.raises(ValueError, match="the target y has a standard deviation of .*: rescale it"):
        vbdl.VBDLRegressor().fit(x, 1e10 * np.arange(len(x)))
