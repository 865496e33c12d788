#pragma once

#include <cstddef>
#include <functional>

#include "gtflops/solution.hpp"

namespace gtflops {

/// Asks the caller now and then whether to go on.
class Patience {
  public:
    explicit Patience(const std::function<bool()>& interrupted) : interrupted_(interrupted) {}

    void spend(std::size_t steps) {
        spent_ += steps;
        if (spent_ < kStepsBetweenQuestions) return;
        spent_ = 0;
        if (interrupted_ && interrupted_()) throw Interrupted();
    }

  private:
    static constexpr std::size_t kStepsBetweenQuestions = std::size_t{1} << 19;  // a few milliseconds
    const std::function<bool()>& interrupted_;
    std::size_t spent_ = 0;
};

}  // namespace gtflops
