#include "files/book.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "files/file.h"

namespace tent {

void FileBook::add(Transfer& transfer, std::function<void()> finished) {
  jobs_.push_back(std::make_unique<FileJob>(FileJob{&transfer, std::move(finished), 0, 0, 0, "", false}));
}

std::optional<FileChunk> FileBook::take() {
  while (!again_.empty()) {
    const FileChunk chunk = again_.front();
    again_.pop_front();
    if (chunk.job->canceled || !chunk.job->trouble.empty()) continue;
    ++chunk.job->in_flight;
    return chunk;
  }
  auto best = jobs_.end();
  for (auto job = jobs_.begin(); job != jobs_.end(); ++job) {
    const Transfer& transfer = *(*job)->transfer;
    if ((*job)->canceled || !(*job)->trouble.empty() || (*job)->piece == transfer.files.size()) continue;
    if (best == jobs_.end() || transfer.priority < (*best)->transfer->priority) best = job;
  }
  if (best == jobs_.end()) return std::nullopt;
  FileJob& job = **best;
  const FilePiece& piece = job.transfer->files[job.piece];
  const FileChunk chunk{&job, &piece, job.at,
                        static_cast<uint32_t>(std::min<uint64_t>(piece.bytes - job.at, FILE_CHUNK))};
  job.at += chunk.bytes;
  if (job.at == piece.bytes) ++job.piece, job.at = 0;
  ++job.in_flight;
  std::rotate(best, best + 1, jobs_.end());   // the others have their turn first
  return chunk;
}

void FileBook::answered(const FileChunk& chunk, ssize_t result) {
  FileJob& job = *chunk.job;
  --job.in_flight;
  if (result == -EINTR || result == -EAGAIN) {
    again_.push_back(chunk);
  } else if (result <= 0) {
    if (!job.trouble.empty()) return;
    const char* why = result < 0 ? std::strerror(static_cast<int>(-result))
                      : chunk.write() ? "nothing was taken"
                                      : "the file ends before that";
    job.trouble = std::string(chunk.write() ? "writing " : "reading ") + std::to_string(chunk.bytes) + " bytes at " +
                  std::to_string(chunk.offset()) + " of file " + chunk.piece->file->name + ": " + why;
  } else if (static_cast<uint64_t>(result) < chunk.bytes) {
    FileChunk rest = chunk;
    rest.at += static_cast<uint64_t>(result);
    rest.bytes -= static_cast<uint32_t>(result);
    again_.push_back(rest);
  }
}

bool FileBook::over(const FileJob& job) {
  return job.in_flight == 0 && (job.canceled || !job.trouble.empty() || job.piece == job.transfer->files.size());
}

std::unique_ptr<FileJob> FileBook::take_finished() {
  for (auto at = jobs_.begin(); at != jobs_.end(); ++at) {
    const FileJob* job = at->get();
    const bool stopped = job->canceled || !job->trouble.empty();
    const auto ours = [&](const FileChunk& chunk) { return chunk.job == job; };
    if (!over(*job) || (!stopped && std::any_of(again_.begin(), again_.end(), ours))) continue;
    std::erase_if(again_, ours);
    std::unique_ptr<FileJob> finished = std::move(*at);
    jobs_.erase(at);
    return finished;
  }
  return nullptr;
}

bool FileBook::cancel(const Transfer& transfer) {
  for (const auto& job : jobs_)
    if (job->transfer == &transfer) return job->canceled = true;
  return false;
}

void FileBook::cancel_all() {
  for (const auto& job : jobs_) job->canceled = true;
}

bool FileBook::holds(const Transfer& transfer) const {
  return std::any_of(jobs_.begin(), jobs_.end(), [&](const auto& job) { return job->transfer == &transfer; });
}

}  // namespace tent
