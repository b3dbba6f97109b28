// Faults on demand: what NPU_SIM_FAULTS and npusim_fault() ask for (see README.md), counted down.
#include "npusim.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace npusim {
namespace {
std::mutex &mutex() {
  static auto *m = new std::mutex;
  return *m;
}

const std::set<std::string> kTransfer = {"delay", "stall", "die", "flip", "error", "async_error"};
const std::map<std::string, std::set<std::string>> kKnown = {
    {"p2p", kTransfer}, {"send", kTransfer}, {"recv", kTransfer},
    {"alloc", {"fail"}}, {"init", {"hang", "error"}},
};

bool read_number(const std::string &text, long *number) {
  char *end;
  *number = strtol(text.c_str(), &end, 10);
  return !text.empty() && *end == 0;
}

// where:what[=value][@n[+]]
const char *parse(std::string text, Fault *fault) {
  long number;
  if (auto at = text.rfind('@'); at != std::string::npos) {
    std::string nth = text.substr(at + 1);
    text.resize(at);
    if (!nth.empty() && nth.back() == '+') {
      fault->onwards = true;
      nth.pop_back();
    }
    if (!read_number(nth, &number) || number < 1) return "after '@' comes a number from 1";
    fault->nth = number;
  }
  if (auto equals = text.find('='); equals != std::string::npos) {
    if (!read_number(text.substr(equals + 1), &number)) return "after '=' comes a number";
    fault->value = number;
    text.resize(equals);
  }
  auto colon = text.find(':');
  if (colon == std::string::npos) return "it has no ':'";
  fault->where = text.substr(0, colon);
  fault->what = text.substr(colon + 1);
  auto known = kKnown.find(fault->where);
  if (known == kKnown.end()) return "it begins with none of p2p, send, recv, alloc, init";
  if (!known->second.count(fault->what)) return "there is no such fault";
  if (fault->what == "delay" && !fault->value) return "a delay needs its milliseconds";
  return nullptr;
}

bool parse_all(const char *spec, std::vector<Fault> *faults) {
  std::string rest = spec;
  while (!rest.empty()) {
    auto end = rest.find(';');
    std::string one = rest.substr(0, end);
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
    if (one == "clear") {
      faults->clear();
      continue;
    }
    Fault fault;
    if (const char *why = parse(one, &fault)) {
      fprintf(stderr, "npusim: bad fault '%s': %s\n", one.c_str(), why);
      return false;
    }
    faults->push_back(fault);
  }
  return true;
}

std::vector<Fault> &faults() {
  static auto *all = [] {
    auto *from_environment = new std::vector<Fault>;
    if (!parse_all(env_str("NPU_SIM_FAULTS", ""), from_environment)) abort();
    return from_environment;
  }();
  return *all;
}
}  // namespace

std::vector<Fault> due(std::initializer_list<const char *> names, size_t size) {
  std::lock_guard<std::mutex> lock(mutex());
  std::vector<Fault> result;
  for (auto &fault : faults()) {
    bool waits = false;
    for (const char *name : names) waits = waits || fault.where == name;
    if (!waits) continue;
    if (fault.where == "alloc" && (long)size < fault.value.value_or(0)) continue;
    fault.seen++;
    if (fault.nth == 0 || fault.seen == fault.nth || (fault.onwards && fault.seen > fault.nth))
      result.push_back(fault);
  }
  return result;
}
}  // namespace npusim

API int npusim_fault(const char *spec) {
  using namespace npusim;
  std::lock_guard<std::mutex> lock(mutex());
  auto changed = faults();
  if (!parse_all(spec, &changed)) return -1;
  faults() = changed;
  return 0;
}
